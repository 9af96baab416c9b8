"""What `mmcpd comb` needs to look ahead: scores of the config's pictures, and the latency of a model that is cut."""

from __future__ import annotations

import argparse
import tempfile

from mmengine.config import Config
from torch import nn

from mmcpd.cli.checks import check_data
from mmcpd.cli.common import UserError
from mmcpd.cli.stages import Stages
from mmcpd.compat import require
from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.combing import shape_combed
from mmcpd.engine.examples import picture_of
from mmcpd.engine.passes import DEPLOYED, runs
from mmcpd.engine.pictures import pictures
from mmcpd.engine.preview import Scored, score_or_weigh
from mmcpd.engine.saving import cut_checked
from mmcpd.slim import mask_
from mmcpd.slim.copying import copied


def scored_by(cfg: Config, model: nn.Module, coupling: Coupling, args: argparse.Namespace, stages: Stages) -> Scored:
    """Score a model's units on pictures of the config's data or of a folder, by its weights where there are no data.

    Raises:
        ValueError: a folder was named that holds no pictures.
    """
    batches, why = [], ''
    try:
        if args.images is None:
            if cfg.get('train_dataloader') is None:
                raise UserError('no data: the config has no train_dataloader')
            check_data(cfg, ('train_dataloader',))
        with stages('read pictures') as progress:
            batches = pictures(
                cfg, model, args.pictures, folder=args.images, shape=shape_combed(coupling), progress=progress
            )
    except UserError as error:
        why = str(error).partition('. ')[0]
    found = score_or_weigh(model, coupling, batches, why)
    if args.checkpoint is None:
        return Scored(found.scores, found.importance, f'{found.why}; of initial weights, give --checkpoint for trained')
    return found


def latencies(
    model: nn.Module, coupling: Coupling, keep: Keep, rounds: int, threads: int | None, stages: Stages
) -> str:
    """Cut a model to a keep, measure it in ONNX Runtime in turns with the dense one, and say the result in words.

    Raises:
        UserError: the model cannot be exported, as it does not run on pictures alone.
    """
    require('deploy')
    from mmcpd.deploy import deploy  # needs ONNX, which nothing else here does

    (data,) = coupling.example.inputs
    picture = picture_of(data)[:1]
    if why := runs(model, picture, DEPLOYED):
        raise UserError(f"--latency: {type(model).__name__} does not run in mode 'tensor' on pictures alone ({why})")
    masked = copied(model)
    mask_(masked, coupling, keep)
    small = cut_checked(masked, coupling, keep)
    with stages('time', 'rounds') as progress, tempfile.TemporaryDirectory() as folder:
        timed = deploy(
            {'dense': model, 'slim': small}, [picture], folder,
            dynamic_batch=False, forward=DEPLOYED, runs=rounds, threads=threads, progress=progress,
        )  # fmt: skip
    dense, slim = timed.latency
    size = 'x'.join(map(str, picture.shape))
    return (
        f'latency in ONNX Runtime at {size}: slim {slim.median:.2f} ms, dense {dense.median:.2f} ms (medians); '
        f'slim / dense {slim.ratio:.3f} (p10 {slim.ratio_p10:.3f}, p90 {slim.ratio_p90:.3f}) of {slim.n} pairs, '
        f'{slim.threads} threads'
    )
