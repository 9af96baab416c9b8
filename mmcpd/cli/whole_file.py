"""What an ONNX file holds beside the model, read from a config and its model: normalisation, scores, facts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn

from mmcpd.cli.common import UserError
from mmcpd.deploy import ClassMap, Normalization, Scores, WholeForward
from mmcpd.deploy.graph import Ending
from mmcpd.deploy.metadata import BOXES
from mmcpd.deploy.parity import LABELS
from mmcpd.engine.build import datasets
from mmcpd.engine.slim_file import is_slim, read_slim
from mmcpd.engine.wrappers import student_config, type_name
from mmcpd.errors import first_line
from mmcpd.slim.compare import evaluating
from mmcpd.slim.trial import FAILURES

Forward = Callable[..., Any]
UNKNOWN = 'as in the data set'  # the order of channels where nothing says it


@dataclass(frozen=True)
class WholeFile:
    """How a file calls the model, what it does before, and what it says of itself."""

    forward: Forward
    before: Normalization | None
    facts: Mapping[str, object]

    @classmethod
    def of(
        cls, cfg: Config, model: nn.Module, pictures: Tensor, forward: Forward, args: argparse.Namespace
    ) -> WholeFile:
        """Return what the options of `mmcpd deploy` ask for; `pictures` are preprocessed.

        Raises:
            UserError: the model's preprocessor, or what makes its predictions, cannot go into a file.
        """
        known = None
        with suppress(*() if args.preprocess else (UserError,)):
            known = normalization_of(cfg, model, pictures.shape[1])
        before = known if args.preprocess else None
        output, after = BOXES if args.boxes else 'logits', None
        if args.postprocess:
            output, after = ending_of(model, pictures, forward)
        channels = (known and known.channels) or UNKNOWN
        if known and known.flip and not before:
            channels = 'BGR'
        facts: dict[str, object] = {
            'model': type(model).__name__,
            'classes': class_names(cfg, args.checkpoint),
            'input': {
                'layout': 'NCHW',
                'dtype': 'uint8' if before else 'float32',
                'channels': channels,
                'size': None if args.size_dynamic else list(pictures.shape[2:]),
            },
            'output': output,
            'normalization': known
            and {'mean': known.mean, 'std': known.std, 'flip': known.flip, 'inside': before is not None},
        }
        return cls(WholeForward(forward, before, after) if before or after else forward, before, facts)

    def taken(self, batches: Sequence[Tensor]) -> list[Any]:
        """Return preprocessed batches as the file takes them."""
        return [batch if self.before is None else self.before.undone(batch) for batch in batches]


def normalization_of(cfg: Config, model: nn.Module, channels: int) -> Normalization:
    """Return what a model's `data_preprocessor` does to a picture's values; it takes RGB wherever the order is known.

    One without mean and std, as YOLOX has, hands on values from 0 to 255.

    mmcv reads files as BGR. Where pictures come from elsewhere, only a preprocessor that turns the channels says which
    order they have; else the file takes the order that the data set has.

    Raises:
        UserError: it does something else.
    """
    preprocessor = cast(Any, getattr(model, 'data_preprocessor', None))
    mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        mean, std = torch.zeros(channels), torch.ones(channels)
    # The shortest decimals that are these numbers: 58.395, not 58.39500045776367.
    values = tuple(tuple(float(str(number)) for number in each.flatten().cpu().numpy()) for each in (mean, std))
    picture = torch.randint(256, (channels, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    try:
        made = preprocessor({'inputs': [picture]}, False)['inputs']
    except FAILURES as error:
        raise UserError(
            f'--preprocess: the data_preprocessor fails on a picture ({first_line(error)}); leave it out'
        ) from error
    for flip in (False, True):
        expected = Normalization(values[0], values[1], flip, '')(picture[None])
        if isinstance(made, Tensor) and made.shape == expected.shape and torch.allclose(made, expected, atol=1e-5):
            loaded = _loaded_order(cfg, flip)
            return Normalization(values[0], values[1], flip=flip != (loaded == 'BGR'), channels='RGB' if loaded else '')
    raise UserError(
        f'--preprocess: the data_preprocessor of {cfg.filename} does more than normalise and turn the channels, which '
        'no file holds; leave it out'
    )


def _loaded_order(cfg: Config, flip: bool) -> str:
    """Return the order of channels that a data set has, or '' where nothing says it."""
    if flip:
        options = {**(cfg.get('data_preprocessor') or {}), **(student_config(cfg).get('data_preprocessor') or {})}
        return 'RGB' if options.get('rgb_to_bgr') else 'BGR'
    pipelines = [each.get('pipeline') or () for each in datasets(cfg.get('test_dataloader'))]
    return 'BGR' if any(type_name(step) == 'LoadImageFromFile' for steps in pipelines for step in steps) else ''


def ending_of(model: nn.Module, pictures: Tensor, forward: Forward) -> tuple[str, Ending]:
    """Return what makes a model's predictions of its logits, with its name; `pictures` are preprocessed.

    It is found by comparing with what the model itself predicts.

    Raises:
        UserError: the model predicts neither scores nor a class map, or makes them otherwise.
    """
    with evaluating(model), torch.no_grad():
        logits = forward(model, pictures)
        try:
            found = cast(Any, model)(pictures, mode='predict')
        except FAILURES as error:
            raise UserError(
                f'--postprocess: {type(model).__name__} does not predict on pictures alone ({first_line(error)}); '
                'leave it out'
            ) from error
        for name, (key, ending) in _endings(model).items() if isinstance(logits, Tensor) else ():
            expected = [_value(each.get(key)) for each in found if hasattr(each, 'get')]
            if expected and all(map(_agrees, expected, ending(logits, pictures))):
                return name, ending
    test_cfg = getattr(model, 'test_cfg', None)
    if isinstance(test_cfg, Mapping) and test_cfg.get('mode') == 'slide':
        raise UserError(
            f'--postprocess: {type(model).__name__} predicts by windows that slide over a picture, which no file '
            'holds: say --cfg-options model.test_cfg.mode=whole, or leave it out'
        )
    raise UserError(
        f'--postprocess: {type(model).__name__} predicts neither softmax or sigmoid scores of its logits nor the class '
        'of each pixel of a whole picture; leave it out'
    )


def _endings(model: nn.Module) -> dict[str, tuple[str, Ending]]:
    """Return what may be, by name, with the key of a sample that holds it."""
    head = getattr(model, 'decode_head', None)
    head = cast(Any, head[-1] if isinstance(head, nn.ModuleList) else head)
    if head is None:
        return {'softmax': ('pred_score', Scores()), 'sigmoid': ('pred_score', Scores(sigmoid=True))}
    threshold = getattr(head, 'threshold', None) if getattr(head, 'out_channels', 2) == 1 else None
    return {'labels': ('pred_sem_seg', ClassMap(getattr(head, 'align_corners', False), threshold))}


def _value(found: Any) -> Tensor | None:
    """Return the scores (classes) or the class map (H, W) in a sample's entry."""
    if isinstance(found, Tensor):
        return found
    return found.data[0] if isinstance(getattr(found, 'data', None), Tensor) else None


def _agrees(expected: Tensor | None, made: Tensor) -> bool:
    if expected is None or expected.shape != made.shape:
        return False
    if made.is_floating_point():
        return torch.allclose(expected, made, rtol=1e-4, atol=1e-6)
    return float((expected != made).float().mean()) <= LABELS


def class_names(cfg: Config, checkpoint: str) -> list[str]:
    """Return the names of the classes, by the slim file or the config's test data; none where nothing says them."""
    found: list[Mapping[str, Any]] = []
    if is_slim(checkpoint):
        found.append(read_slim(checkpoint)['meta'].get('dataset_meta') or {})
    for config in datasets(cfg.get('test_dataloader')):
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
            kind = DATASETS.get(config['type']) if isinstance(config['type'], str) else config['type']
        found += [config.get('metainfo') or {}, getattr(kind, 'METAINFO', None) or {}]
    return next(([str(name) for name in each['classes']] for each in found if each.get('classes')), [])
