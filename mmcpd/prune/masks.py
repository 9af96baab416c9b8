"""Masking: the removed units' rows are zero, and statistics over channels are those of the units that stay.

With both, the masked model computes what the slimmed one computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..comb.errors import SlimError
from ..comb.groups import Comb, Keep
from ..comb.source import asking
from ..comb.trace import REDUCTIONS, SOFTMAXES

RMS_NORMS = (F.rms_norm, torch.rms_norm)
Live = Mapping[tuple[int, int], Tensor]  # the channels that stay, by dimension (from the end) and how many there are


class _OverLive(TorchFunctionMode):
    """Run the statistics of one module on its live channels only: gather, the same function, scatter."""

    def __init__(self, module: nn.Module, live: Live) -> None:
        super().__init__()
        self.module, self.live = module, live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if (name in REDUCTIONS or name in SOFTMAXES) and self._mine():
            return self.reduce(func, name in SOFTMAXES, *args, **kwargs)
        if func is F.layer_norm and self._mine():
            return self.layer_norm(*args, **kwargs)
        if func is F.group_norm and self._mine():
            return self.group_norm(*args, **kwargs)
        if func in RMS_NORMS and self._mine():
            return self.rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _mine(self) -> bool:
        """Say whether the module itself asks, and not one inside it, which may have channels of its own."""
        return not self.module._modules or asking() is self.module

    def _live(self, x: Tensor, dim: int) -> Tensor | None:
        """Return the live channels of one dimension, which counts from the end, or None where all of it stays."""
        live = self.live.get((dim, x.shape[dim]))
        return None if live is None else live.to(x.device)

    def _norm(self, x: Tensor, dim: int, norm: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        live = self._live(x, dim)
        if live is None:
            return norm(x, weight, bias)
        parameters = [p if p is None else p.index_select(max(dim, -p.dim()), live) for p in (weight, bias)]
        y = norm(x.index_select(dim, live), *parameters)
        return y.new_zeros(x.shape).index_copy(dim, live, y)

    def layer_norm(
        self,
        input: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        longer = [d for d in range(-len(shape), 0) if shape[d] > 1]
        if len(longer) != 1:
            return F.layer_norm(input, shape, weight, bias, eps)
        span = len(shape)
        return self._norm(input, longer[0], lambda x, w, b: F.layer_norm(x, x.shape[-span:], w, b, eps), weight, bias)

    def group_norm(
        self,
        input: Tensor,
        groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        return self._norm(input, 1 - input.dim(), lambda x, w, b: F.group_norm(x, groups, w, b, eps), weight, bias)

    def rms_norm(self, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if len(shape) != 1:
            return F.rms_norm(input, shape, weight, eps)
        return self._norm(input, -1, lambda x, w, _: F.rms_norm(x, x.shape[-1:], w, eps), weight, None)

    def reduce(self, func: Any, softmax: bool, input: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.pop('axis', dim)
        given = args if dim is None else (dim, *args)
        if isinstance(dim, Tensor) or 'other' in kwargs:  # torch.max(a, b)
            return func(input, *given, **kwargs)
        dims = [dim] if isinstance(dim, int) else dim or range(input.dim())
        x, scatter = input, None
        for d in (d % x.dim() - x.dim() for d in dims):
            live = self._live(input, d)
            if live is not None:
                x, scatter = x.index_select(d, live), (d, live)
        y = func(x, *given, **kwargs)
        return y.new_zeros(input.shape).index_copy(*scatter, y) if softmax and scatter else y


def _no_fused_kernel(module: nn.Module, args: Any) -> None:
    """Do nothing: torch's encoder leaves its fused kernel, which would pass by a masked norm, where hooks are."""


class MaskedForward:
    """The forward of one module with its statistics over the live channels; sits on the instance, not on the class.

    Args:
        module: the module that normalises.
        live: the channels that stay, by dimension (from the end) and how many there are in all.
    """

    def __init__(self, module: nn.Module, live: Live) -> None:
        self.module, self.live = module, live

    @classmethod
    def put_on(cls, module: nn.Module, live: Live) -> None:
        """Let a module's statistics be over these channels from now on."""
        cls.take_off(module)
        module.forward = cls(module, live)
        module.register_forward_pre_hook(_no_fused_kernel)

    @staticmethod
    def take_off(module: nn.Module) -> None:
        """Give a module its own forward back, if it has another."""
        if isinstance(vars(module).get('forward'), MaskedForward):
            del module.forward
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_fused_kernel]:
                del module._forward_pre_hooks[key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _OverLive(self.module, self.live):
            return type(self.module).forward(self.module, *args, **kwargs)


def unmask_norms_(model: nn.Module) -> None:
    """Give every norm its own forward back."""
    for module in model.modules():
        MaskedForward.take_off(module)


class Masker:
    """Apply a keep to one model again and again, as an optimizer step asks for it.

    Args:
        model: the model that was combed.
        comb: what combing found.

    Example:
        >>> masker = Masker(model, comb)
        >>> masker.apply_(keep)                        # weights, statistics, norms
        >>> masker.apply_state_(keep, optimizer)       # momentum would bring removed weights back
    """

    def __init__(self, model: nn.Module, comb: Comb) -> None:
        self.model, self.comb = model, comb
        self.tensors = named_tensors(model)
        self._flat: Tensor | None = None
        self._factors: list[tuple[Tensor, Tensor]] = []

    def factors(self, keep: Keep) -> list[tuple[Tensor, Tensor]]:
        """Return `(tensor, factor)` for all that is masked, factors of 0 and 1; kept until the keep changes.

        A product is an order of magnitude faster than filling rows, above all along any but the first dimension; the
        rows are filled once, when the keep changes.
        """
        flat = torch.cat([keep[g.name] for g in self.comb.groups]) if self.comb.groups else torch.empty(0)
        if self._flat is None or not torch.equal(flat, self._flat):
            self._factors = []
            for name, dims in live_rows(self.comb, keep).items():
                tensor = self.tensors[name]
                for dim, live in dims.items():
                    shape = [1] * tensor.dim()
                    shape[dim] = -1
                    tensor.index_fill_(dim, (~live).nonzero().flatten().to(tensor.device), 0)  # 0 * nan is not 0
                    factor = live.to(tensor.device, tensor.dtype).reshape(shape)
                    if dim > 0:  # twice as fast where the last dimensions are those of a kernel
                        factor = factor.expand(*shape[:dim], *tensor.shape[dim:]).contiguous()
                    self._factors.append((tensor, factor))
            self._flat = flat.clone()
            self._mask_norms(keep)
        return self._factors

    @torch.no_grad()
    def apply_(self, keep: Keep) -> None:
        """Write zeros into the removed rows of parameters and statistics, in place."""
        for tensor, factor in self.factors(keep):
            tensor.mul_(factor)

    @torch.no_grad()
    def apply_state_(self, keep: Keep, optimizer: torch.optim.Optimizer) -> None:
        """Write zeros into the optimizer's state of the removed rows (momentum, second moments)."""
        for tensor, factor in self.factors(keep):
            for value in optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    value.mul_(factor.to(value.device, value.dtype))

    def _mask_norms(self, keep: Keep) -> None:
        flat = torch.from_numpy(self.comb.flat(keep))
        found: dict[str, dict[tuple[int, int], Tensor]] = {}
        for path, axis, dim in self.comb.norms:
            units = torch.from_numpy(self.comb.axes[axis])
            live = (units < 0) | flat[units.clamp(min=0)]
            if not torch.equal(found.setdefault(path, {}).setdefault((dim, len(live)), live), live):
                where = path or 'the model itself'
                raise SlimError(
                    f'{where} normalises two different sets of {len(live)} channels; with trial=True comb freezes them'
                )
        for path, by_width in found.items():
            module = self.model.get_submodule(path)
            partly = {key: live.nonzero().flatten() for key, live in by_width.items() if not bool(live.all())}
            if partly:
                MaskedForward.put_on(module, partly)
            else:
                MaskedForward.take_off(module)


def live_rows(comb: Comb, keep: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return which rows stay, a BoolTensor by tensor and dimension; only where some go."""
    live: dict[str, dict[int, Tensor]] = {}
    for group in comb.groups:
        gone = ~keep[group.name]
        if not bool(gone.any()):
            continue
        for member in group.members:
            dims = live.setdefault(member.tensor, {})
            if member.dim not in dims:
                dims[member.dim] = torch.ones(comb.shapes[member.tensor][member.dim], dtype=torch.bool)
            dims[member.dim][member.rows(gone)] = False
    return live


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those without storage in the state dict included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def mask_(model: nn.Module, comb: Comb, keep: Mapping[str, Tensor]) -> None:
    """Mask a model in place: then it computes what the slimmed model computes.

    Args:
        model: the model that was combed, or a copy of it.
        comb: what combing found.
        keep: `{group name: BoolTensor(units)}`, True = stays.

    Raises:
        ValueError: if the keep does not fit.
        SlimError: if one module takes statistics over two different sets of channels, in one dimension and of one
            width; `comb` freezes these unless `trial=False`.

    Example:
        >>> keep = c.keep()
        >>> keep['layer1.0.conv1'][::2] = False
        >>> mask_(model, c, keep)
    """
    comb.check(keep)
    Masker(model, comb).apply_(dict(keep))
