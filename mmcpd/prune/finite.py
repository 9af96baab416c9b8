"""Weights, gradients and losses that are not finite: which tensor, and since which iteration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import PruneError
from .importance import Importance

CURES = 'lower the learning rate, clip gradients, or start from weights that are finite'


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, None where all are finite.

    Example:
        >>> not_finite([('a', torch.zeros(2)), ('b', torch.tensor([0.0, torch.nan]))])
        'b'
    """
    flags = [(name, torch.isfinite(tensor).all()) for name, tensor in tensors]
    if not flags:
        return None
    fine = torch.stack([flag.to(flags[0][1].device) for _, flag in flags]).tolist()  # waits for a device once
    return next((name for (name, _), flag in zip(flags, fine, strict=True) if not flag), None)


def broken_tensor(model: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite, or buffer that holds a NaN, None where there is none.

    Buffers may hold infinities: the masks of attentions do.

    Example:
        >>> broken_tensor(model) is None
        True
    """
    return not_finite(_held(model))


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)


def check_finite(model: nn.Module, iteration: int | None = None) -> None:
    """Refuse to prune a model whose weights are not finite, after so many iterations where that is known.

    Raises:
        PruneError: with the tensor, and what to do.

    Example:
        >>> _ = model.fc.bias.data.fill_(torch.nan)
        >>> check_finite(model, 40)
        Traceback (most recent call last):
        mmcpd.errors.PruneError: fc.bias is not finite after 40 iterations, and no unit can be chosen by it: lower ...
    """
    name = broken_tensor(model)
    if name is not None:
        when = '' if iteration is None else f' after {iteration} iterations'
        raise PruneError(f'{name} is not finite{when}, and no unit can be chosen by it: {CURES}')


class Missing:
    """Why there is no score since the last event.

    Example:
        >>> from mmcpd.prune import build_importance
        >>> Missing(model).why(20, 10, build_importance('hessian', coupling.groups))
        'no unit is removed at iteration 20, and nothing was scored since 10: no step was taken, as where mixed ...'
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._stepped, self._fault = False, ''

    def step(self, importance: Importance, due: bool) -> None:
        """Take note of a step before it is taken; where units are `due` and nothing is scored, of its gradients too."""
        self._stepped = True
        if due and not importance.iterations:
            gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            name = not_finite(gradients)
            self._fault = f'the gradient of {name}' if name else ''

    def why(self, iteration: int, last: int, importance: Importance) -> str:
        """Say it, after so many iterations, and so many at the last event."""
        since = f'no unit is removed at iteration {iteration}, and nothing was scored since {last}'
        if importance.every_iteration and not self._stepped:
            return f'{since}: no step was taken, as where mixed precision finds gradients that are not finite'
        fault = self._fault or broken_tensor(self.model) or 'the score'
        return f'{since}: {fault} is not finite. If that goes on, {CURES}'


class FiniteWatch:
    """Know since when the losses of a run are not finite, without waiting for the device.

    Example:
        >>> watch = FiniteWatch()
        >>> for iteration, loss in enumerate([1.0, float('nan'), 0.5, float('inf'), float('nan')], 1):
        ...     watch.see(iteration, {'loss': torch.tensor(loss)})
        >>> watch.since
        4
    """

    def __init__(self) -> None:
        self._since = torch.tensor(-1)

    @property
    def since(self) -> int | None:
        """The first iteration whose losses were not finite, and none since; None where the last ones are."""
        found = int(self._since)
        return found if found >= 0 else None

    def see(self, iteration: int, outputs: Mapping[str, object] | None) -> None:
        """Take note of what an iteration put out."""
        losses = [v.detach() for v in (outputs or {}).values() if isinstance(v, Tensor) and v.is_floating_point()]
        if losses:
            fine = torch.stack([torch.isfinite(loss).all() for loss in losses]).all()
            since = self._since.to(fine.device)
            self._since = torch.where(fine, -1, torch.where(since < 0, iteration, since))
