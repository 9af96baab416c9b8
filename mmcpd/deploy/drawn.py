"""Fix the random numbers that a forward draws: an exported file has constants in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmcpd.random_state import seeded

# What draws numbers that depend on no input; the second kind writes them into its first argument.
MAKING = (
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.normal,
)  # fmt: skip
FILLING = (Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.exponential_)


class Fixed(nn.Module):
    """Call `forward(model, *inputs)`, which is what exporters take, with the random numbers of one run from seed 0.

    Numbers that are drawn by an operation on activations, as dropout's, stay random.

    Example:
        >>> fixed = Fixed(model, lambda m, x: m(x) * torch.rand(2), (images,))
        >>> bool((fixed(images) == fixed(images)).all())
        True
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any] | None, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.model, self.call = model, forward
        draws: list[Tensor] = []
        with seeded(0), torch.no_grad(), _Recorded(draws):
            self.run(*inputs)
        for number, values in enumerate(draws):
            self.register_buffer(f'drawn_{number}', values, persistent=False)
        self.count = len(draws)

    def run(self, *inputs: Tensor) -> Any:
        return self.model(*inputs) if self.call is None else self.call(self.model, *inputs)

    def forward(self, *inputs: Tensor) -> Any:
        if not self.count:
            return self.run(*inputs)
        with _Replayed([getattr(self, f'drawn_{number}') for number in range(self.count)]):
            return self.run(*inputs)


class _Recorded(TorchFunctionMode):
    """Keep what is drawn."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MAKING or func in FILLING:
            self.draws.append(out.detach().clone())
        return out


class _Replayed(TorchFunctionMode):
    """Give out what was drawn, in the same order."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__()
        self.draws = iter(draws)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MAKING:
            return next(self.draws).clone()
        if func in FILLING:
            return args[0].zero_().add_(next(self.draws))  # the exporter below opset 18 knows no copy_
        return func(*args, **(kwargs or {}))
