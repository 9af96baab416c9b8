"""What a row of the zoo is: a model family that builds its network and its inputs, with random weights that matter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Deployed(nn.Module):
    """Run a network as it is deployed: inputs `(N, C, H, W)` in, a tuple of tensors out.

    What the modules at the paths in `heads` give out is in the tuple too: of a detector, what precedes the choice of
    boxes. `mode` is MMEngine's, None for a network that has none.
    """

    def __init__(self, net: nn.Module, mode: str | None = 'tensor', heads: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.net = net
        self.mode = mode
        self.heads = heads

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        seen: list[Any] = []
        handles = [
            self.net.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out))
            for path in self.heads
        ]
        try:
            return tuple(flatten([self.call(*inputs), seen]))
        finally:
            for handle in handles:
                handle.remove()

    def call(self, *inputs: Any) -> Any:
        return self.net(*inputs) if self.mode is None else self.net(*inputs, mode=self.mode)


def flatten(value: Any) -> list[Tensor]:
    """List the tensors of nested tuples, lists and dicts in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flatten(v)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class Family(ABC):
    """Hold one row of the sweep.

    `config` says which variant it is; `size` is the height and width of a picture in pixels, with the frames of a clip
    before them; `batch` is how many of them come in one tensor, and `views` how many such tensors a forward takes.
    """

    package: str
    name: str
    config: str
    size: tuple[int, ...] = (224, 224)
    channels: int = 3
    batch: int = 1
    views: int = 1

    @property
    def key(self) -> str:
        return f'{self.package}/{self.name}'

    def prepare(self) -> None:  # noqa: B027 - few networks ask for anything
        """Set up in a process what the network asks for when it runs."""

    @abstractmethod
    def net(self) -> Deployed:
        """Build the network; nothing is downloaded."""

    def inputs(self, batch: int = 0, size: tuple[int, ...] = (), seed: int = 0) -> tuple[Any, ...]:
        """Draw the arguments of a forward, each `(batch, channels, *size)`, by default as the family has them."""
        g = torch.Generator().manual_seed(seed)
        shape = (batch or self.batch, self.channels, *(size or self.size))
        return tuple(torch.randn(shape, generator=g) for _ in range(self.views))

    def other_sizes(self) -> list[tuple[int, ...]]:
        """List the sizes to try beside its own: another shape in steps of 32 pixels, or else twice the size."""
        *frames, height, width = self.size
        smaller = (height - 64, width - 32) if min(height, width) >= 192 else (height + 32, width + 64)
        return [(*frames, *smaller), (*frames, 2 * height, 2 * width)]


def build(family: Family, seed: int = 0) -> tuple[Deployed, tuple[Any, ...]]:
    """Build a family's model with random weights, in eval mode, and its inputs."""
    torch.manual_seed(seed)
    model, inputs = family.net(), family.inputs(seed=seed)
    return calibrate_(randomise_(model, seed).eval(), *inputs), inputs


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter and running statistic anew, so that no branch is dead.

    As built, gammas at zero, layer scales at 1e-6 and zero-initialised projections cut branches off, and a test that
    compares outputs could not fail there; parameters from `torch.empty` would not even be repeatable.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor) -> None:
        t.copy_(torch.rand(t.shape, generator=g) + 0.5)

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.randn(t.shape, generator=g) * std)

    for name, p in model.named_parameters():
        if name.endswith('bias') and p.dim() == 1:
            normal(p, 0.1)
        elif p.numel() == max(p.shape, default=1):  # gammas, layer scales, temperatures, whatever their shape
            uniform(p)
        elif p.shape[0] == 1:  # class tokens, position embeddings
            normal(p, 0.2)
        else:  # half the usual deviation for linear layers: kernels like exp(q k) stay within float32
            normal(p, (p.shape[0] / p.numel()) ** 0.5 * (0.5 if p.dim() == 2 else 1))
    for name, b in model.named_buffers():
        if name.endswith('running_mean'):
            normal(b, 0.1)
        elif name.endswith('running_var'):
            uniform(b)
    return model


@torch.no_grad()
def calibrate_(model: nn.Module, *inputs: Any) -> nn.Module:
    """Multiply each batch norm's random running statistics into what the inputs give there.

    Random statistics alone let the signal grow by many powers of ten with depth: gates saturate and float32 is lost.
    A batch norm that sees one value per channel keeps the statistics it has.
    """

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].transpose(0, 1).flatten(1)  # (C, N * H * W)
        if norm.running_mean is not None and rows.shape[1] > 1:
            norm.running_mean.mul_(rows.std(1)).add_(rows.mean(1))
            norm.running_var.mul_(rows.var(1)).add_(1e-3)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_pre_hook(measure) for m in norms]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return model
