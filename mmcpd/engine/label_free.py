"""Train a small model on what the dense one answers, without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from mmcpd.compat import call
from mmcpd.distill import KDLoss
from mmcpd.engine.build import prunes
from mmcpd.engine.wrappers import type_name
from mmcpd.nested import tensors_in
from mmcpd.random_state import seeded
from mmcpd.slim.compare import evaluating

# Of the learning rate of a config that trains from scratch: a refitted model needs little, see docs/results.md.
RATE = 0.1
FLIP = 0.5  # share of pictures from a folder that are turned left to right


def teach_(
    student: BaseModel,
    teacher: nn.Module,
    cfg: Config,
    iterations: int,
    *,
    softmax: bool,
    forward: Callable[..., Any] = call,
    lr: float | None = None,
    pictures: Sequence[Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train a student, in place, to give out what its teacher does; it is in eval mode afterwards.

    The config's own optimizer takes `iterations` steps, from `lr` down to nothing along a cosine; by default that is
    the config's where it prunes (a `PruneHook`), and a tenth of it where it trains from scratch. Where the outputs are
    logits of classes (`softmax`) the first of them are compared by `KDLoss`, all others by their squared difference, as
    a share of the teacher's variance.

    Both run by `forward(model, inputs)` as they are deployed; only the student's innermost modules train (norms,
    dropout, stochastic depth). A head may give out something else while it trains, boxes in units of their stride say,
    which the teacher's could not be compared with.

    It trains on the config's training data, whose labels are not read, or on `pictures`: preprocessed batches (N, C, H,
    W), each picture flipped at random.

    Raises:
        ValueError: the config has no optimizer, or no data to train on and no pictures are given; the loss is not
            finite, because the learning rate is too high.
    """
    optimizer = _optimizer(student, cfg, lr)
    schedule = CosineAnnealingLR(optimizer.optimizer, iterations)
    batches = _from_pictures(pictures, seed) if pictures is not None else _from_config(student, cfg, seed)
    student.train()
    for module in student.modules():
        module.training = module.training and not any(module.children())
    with seeded(seed):  # augmentation, dropout
        for done, (_, inputs) in enumerate(zip(range(iterations), batches, strict=False), 1):
            with evaluating(teacher):
                wanted = tensors_in(forward(teacher, inputs))
            with optimizer.optim_context(student):
                loss = difference(tensors_in(forward(student, inputs)), wanted, softmax)
            if not torch.isfinite(loss):
                rate = optimizer.optimizer.param_groups[0]['initial_lr']
                raise ValueError(
                    f'iteration {done} of the distillation gave a loss of {loss:.1e}: lower the learning rate, {rate:g}'
                )
            optimizer.update_params(loss)
            schedule.step()
            if progress is not None:
                progress(done, iterations)
    student.eval()


def difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor], softmax: bool) -> Tensor:
    """Return how far outputs are from the wanted ones, a scalar: see `teach_`.

    Example:
        >>> float(difference([torch.zeros(2, 3)], [torch.zeros(2, 3)], softmax=True))
        0.0
    """
    pairs = [(out, like.detach()) for out, like in zip(outputs, wanted, strict=True) if out.is_floating_point()]
    terms = [KDLoss()(*pairs.pop(0))] if softmax else []
    terms += [(out - like).square().mean() / like.var().clamp(min=1e-12) for out, like in pairs]
    return torch.stack(terms).sum()


def check_teachable(cfg: Config) -> None:
    """See that a config says how to train.

    Raises:
        ValueError: it has no optimizer with a learning rate.
    """
    if 'lr' not in ((cfg.get('optim_wrapper') or {}).get('optimizer') or {}):
        raise ValueError(f"{cfg.filename} has no optim_wrapper with an lr: distillation trains by the config's own")


def _optimizer(student: nn.Module, cfg: Config, lr: float | None) -> OptimWrapper:
    check_teachable(cfg)
    config = copy.deepcopy(cfg.optim_wrapper)
    if type_name(config) == 'AmpOptimWrapper' and next(student.parameters()).device.type == 'cpu':
        config = {key: value for key, value in config.items() if key not in ('loss_scale', 'dtype')}
        config['type'] = 'OptimWrapper'  # MMEngine's mixed precision needs an accelerator
    share = 1 if prunes(cfg) else RATE
    config['optimizer']['lr'] = share * config['optimizer']['lr'] if lr is None else lr
    return build_optim_wrapper(student, ConfigDict(config))


def _from_config(student: nn.Module, cfg: Config, seed: int) -> Iterator[Tensor]:
    """Yield the inputs of the config's training batches without end."""
    if cfg.get('train_dataloader') is None:
        raise ValueError(f'{cfg.filename} has no train_dataloader: give a folder of pictures to distil on')
    model: Any = student
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        loader = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader), seed=seed)
    while True:
        for data in loader:
            yield model.data_preprocessor(data, True)['inputs']


def _from_pictures(pictures: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    """Yield random batches of the given ones' size without end."""
    every = torch.cat(list(pictures))
    generator = torch.Generator().manual_seed(seed)
    size = min(len(pictures[0]), len(every))
    while True:
        for chosen in torch.randperm(len(every), generator=generator).split(size):
            turned = torch.rand(len(chosen), 1, 1, 1, generator=generator) < FLIP
            batch = every[chosen.to(every.device)]
            yield torch.where(turned.to(batch.device), batch.flip(-1), batch)
