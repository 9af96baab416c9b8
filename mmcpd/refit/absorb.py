"""Make each batch norm's statistics those of its input, and leave the function in eval mode what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compat import call
from ..example import arguments, own
from ..layer_calls import storage
from ..slim.compare import evaluating
from ..slim.trial import double
from .report import SkippedLayer
from .trails import Norm


@dataclass(frozen=True)
class Absorbed:
    """Names of the running means of the batch norms that were rewritten, and those that were left alone."""

    rewritten: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]


class _Inputs(TorchFunctionMode):
    """Sum up the inputs of each batch norm over a forward, within a `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[int, Norm] = {}  # storage of the running mean -> its latest call
        self.affines: list[int] = []  # storages of weights and biases, one for each norm that has them
        self.counts: dict[int, int] = {}
        self.sums: dict[int, Tensor] = {}  # (2, C): of the distance to the running mean, and of its square

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            self._add(Norm.of(args, kwargs))
        return func(*args, **kwargs)

    def _add(self, norm: Norm) -> None:
        key = None if norm.running_mean is None else storage(norm.running_mean)
        if key is None or key not in self.norms:
            self.affines += {storage(t) for t in (norm.weight, norm.bias) if t is not None}
        if norm.training or norm.running_mean is None or key is None:
            return
        self.norms[key] = norm._replace(input=norm.input.new_empty(0))
        x = norm.input.movedim(1, 0).flatten(1)  # (C, positions)
        x = (x.cpu() if x.device.type == 'mps' else x) - norm.running_mean.to(x)[:, None]
        square = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
        self.counts[key] = self.counts.get(key, 0) + x.shape[1]
        self.sums[key] = self.sums.get(key, torch.zeros(())) + torch.stack([x.sum(1, dtype=torch.float64), square])


@torch.no_grad()
def absorb_(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[object, ...]],
    *,
    forward: Callable[..., object] = call,
) -> Absorbed:
    """Rewrite statistics and affine of each batch norm so that training sees what evaluation sees, in place.

    A refit changes what norms read, and their running statistics are no longer those of their inputs: at the first
    training step the function would jump. Measured are mean and variance of each input in eval mode; weight and bias
    take up the difference. Removed channels, of which all is zero, stay zero.

    Args:
        model: a refitted model, masked or slim.
        batches: inputs, each a tensor `(N, C, H, W)` or a tuple of the forward's arguments.
        forward: `forward(model, *inputs)`; the default calls the model.

    Raises:
        ValueError: no batch, or an input of a norm that is not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> before = net(images)
        >>> absorb_(net, [images]).rewritten
        ('1.running_mean',)
        >>> torch.allclose(net(images), before, atol=1e-5), torch.allclose(net.train()(images), before, atol=1e-2)
        (True, True)
    """
    inputs = [arguments(batch) for batch in batches]
    if not inputs:
        raise ValueError('there is no batch to measure the inputs of norms on: give at least one')
    found = _Inputs()
    with evaluating(model), found:
        for batch in inputs:
            forward(model, *own(batch))
    names = {storage(buffer): name for name, buffer in model.named_buffers()}
    shared = {each for each, count in Counter(found.affines).items() if count > 1}
    rewritten, skipped = [], []
    for key, norm in found.norms.items():
        name = names.get(key, 'a norm outside the model')
        reason = _obstacle(model, norm, name if key in names else None, shared)
        if reason:
            skipped.append(SkippedLayer(name, reason))
            continue
        if not bool(torch.isfinite(found.sums[key]).all()):
            raise ValueError(f"the norm of '{name}' reads values that are not finite: give inputs for which they are")
        _rewrite_(norm, found.counts[key], found.sums[key])
        rewritten.append(name)
    return Absorbed(tuple(rewritten), tuple(skipped))


def _obstacle(model: nn.Module, norm: Norm, name: str | None, shared: set[int]) -> str | None:
    """Return why a norm cannot be rewritten."""
    parameters = {storage(p) for p in model.parameters()}
    if norm.weight is None or norm.bias is None:
        return 'it has no weight and bias that could take up the difference'
    affine = {storage(norm.weight), storage(norm.bias)}
    if affine & shared:
        return 'another norm has the same weight or bias'
    return None if name is not None and affine <= parameters else 'its weight and bias are computed'


def _rewrite_(norm: Norm, count: int, sums: Tensor) -> None:
    """Give a norm the statistics of its input, and let weight and bias take up the difference."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.weight is not None and norm.bias is not None
    mean, var, weight, bias = (double(t) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    shift, square = sums / count
    removed = (weight == 0) & (bias == 0) & (mean == 0) & (var == 0)
    new_var = (square - shift.square()).clamp(min=0) * (count / max(1, count - 1))
    scale = weight / (var + norm.eps).sqrt()
    still = new_var + norm.eps <= 0  # it puts out one value, which no statistics of its inputs would give
    values = (mean + shift, new_var, scale * (new_var + norm.eps).sqrt(), bias + scale * shift)
    for tensor, value in zip((norm.running_mean, norm.running_var, norm.weight, norm.bias), values, strict=True):
        tensor.copy_(torch.where(removed, torch.zeros_like(value), torch.where(still, double(tensor), value)))
