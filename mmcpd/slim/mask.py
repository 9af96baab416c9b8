"""Mask a model: removed units' rows are zero, and statistics over channels are those of the kept units.

With both, the masked model computes what the slimmed one computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..coupling import Coupling, Keep
from ..errors import SlimError
from ..fixes import CodePlace
from .call_sites import code_place
from .computed import give_kept_
from .copying import forget_, writable_
from .layout import gathered, spread
from .plain_tensors import register_plain_

# Functions that may run over only the kept channels: their result is then what it is in the slimmed model. SOFTMAXES
# keep the channels. They take `(input, dim, ...)`, those of norms `(input, order, dim, ...)`: dim is an
# integer, several, or none for all of them.
NORMS = {'norm', 'linalg_norm', 'linalg_vector_norm', 'normalize'}
REDUCTIONS = NORMS | set(
    'mean sum var std var_mean std_mean amax amin max min aminmax median nanmedian prod logsumexp nanmean nansum '
    'all any count_nonzero'.split()
)
SOFTMAXES = set('softmax log_softmax softmin normalize'.split())
INPUTS = ('input', 'x')  # their names for it
# They run kernels of their own, which would pass by a masked norm inside, unless a function mode is active.
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
RMS_NORMS = (F.rms_norm, torch.rms_norm)
LAST_DIMENSION = {'rms_norm', 'batch_norm'}  # the same, where it normalises over the last dimension


class Site(NamedTuple):
    """A statistic of a running forward: where it is taken, over which dimension (from the end), how many channels."""

    place: CodePlace
    dim: int
    width: int


@dataclass
class Kept:
    """The numbers of the kept channels at each site, on the device where they were used last.

    Attributes:
        alone: where a line takes no other statistic along a dimension: the unit of each position, and what is kept.
    """

    numbers: dict[Site, Tensor] = field(default_factory=dict)
    alone: dict[tuple[CodePlace, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def at(self, site: Site) -> Tensor | None:
        """Return the numbers at a site, or None where all are kept.

        Raises:
            SlimError: the width is not the one that was combed with, and does not say where the channels are.
        """
        units, kept = self.alone.get(site[:2], (None, None))
        if site not in self.numbers and units is not None and kept is not None and site.width != len(units):
            longer = stretched(units, kept, site.width)
            if longer is None:
                where = site.place.module or 'the model itself'
                raise SlimError(
                    f'a statistic in {where} goes over {site.width} positions, and went over {len(units)} channels '
                    'when the model was combed: on inputs of another size use the slim model, or comb with such a one'
                )
            return longer.nonzero().flatten()
        return self.numbers.get(site)


def stretched(units: Tensor, kept: Tensor, width: int) -> Tensor | None:
    """Return which of `width` positions are kept, (width,) bool, where channels are merged with places or samples.

    Each channel has equally many positions beside each other, or all of them come again and again; None where neither
    fits, or both.

    Example:
        >>> units, kept = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, False, False])
        >>> stretched(units, kept, 6).tolist()
        [True, True, True, False, False, False]
        >>> stretched(torch.tensor([0, 1, 0, 1]), torch.tensor([True, False, True, False]), 6).tolist()
        [True, False, True, False, True, False]
    """
    size = len(units)
    bounds = (units[1:] != units[:-1]).nonzero().flatten() + 1
    each = math.gcd(size, *bounds.tolist())
    single = units[::each]
    lengths = (n for n in range(1, len(single) + 1) if len(single) % n == 0)
    period = next(n for n in lengths if torch.equal(single, single[:n].repeat(len(single) // n)))
    again = period < len(single)
    if each > 1 and not again and not width % len(single):
        return kept[::each].repeat_interleave(width // len(single))
    if each == 1 and again and not width % period:
        return kept[:period].repeat(width // period)
    return None


class _OverKept(TorchFunctionMode):
    """Run the statistics of one module on its kept channels only: gather, the same function, scatter."""

    def __init__(self, module: nn.Module, path: str, kept: Kept) -> None:
        super().__init__()
        self.module, self.path, self.kept = module, path, kept
        self.place: CodePlace | None = None  # of the statistic that is being taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, '__name__', ''), dict(kwargs or {})
        known = name in REDUCTIONS | SOFTMAXES
        if known and not args:
            args = tuple(kwargs.pop(each) for each in INPUTS if each in kwargs)
        norms = {F.layer_norm: self.layer_norm, F.group_norm: self.group_norm, F.batch_norm: self.batch_norm}
        handler: Any = (norms | dict.fromkeys(RMS_NORMS, self.rms_norm)).get(func)
        if handler is None and not known:
            return func(*args, **kwargs)
        module, self.place = code_place(self.path)
        if module is not self.module:  # one inside it, which may have channels of its own
            return func(*args, **kwargs)
        return handler(*args, **kwargs) if handler else self.reduce(func, name, *args, **kwargs)

    def _kept(self, x: Tensor, dim: int) -> Tensor | None:
        """Return the kept channels of one dimension, which counts from the end, or None where all are kept."""
        if self.place is None:
            return None
        site = Site(self.place, dim, x.shape[dim])
        found = self.kept.at(site)
        if found is not None and found.device != x.device:
            found = found.to(x.device)
            if site in self.kept.numbers:  # it stays where the model is
                self.kept.numbers[site] = found
        return found

    def _norm(self, x: Tensor, dim: int, norm: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        kept = self._kept(x, dim)
        if kept is None:
            return norm(x, weight, bias)
        parameters = [p if p is None else p.index_select(max(dim, -p.dim()), kept) for p in (weight, bias)]
        return spread(norm(gathered(x, dim, kept), *parameters), dim, kept, x.shape[dim])

    def layer_norm(
        self, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        span = len(shape)
        longer = [d for d in range(-span, 0) if shape[d] > 1]
        dim = next((d for d in longer if self._kept(input, d) is not None), -1)
        return self._norm(input, dim, lambda x, w, b: F.layer_norm(x, x.shape[-span:], w, b, eps), weight, bias)

    def group_norm(
        self, input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        return self._norm(input, 1 - input.dim(), lambda x, w, b: F.group_norm(x, groups, w, b, eps), weight, bias)

    def rms_norm(self, input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if len(shape) != 1:
            return F.rms_norm(input, shape, weight, eps)
        return self._norm(input, -1, lambda x, w, _: F.rms_norm(x, x.shape[-1:], w, eps), weight, None)

    def batch_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise over the last dimension too, as for standardised weights `(1, O, I * k * k)`."""
        return self._norm(input, -1, lambda x, *_: F.batch_norm(x, *args, **kwargs), None, None)

    def reduce(self, func: Any, name: str, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        at = int(name in NORMS)
        dim = kwargs.get('dim', kwargs.get('axis', args[at] if len(args) > at else None))
        if isinstance(dim, Tensor) or 'other' in kwargs:  # torch.max(a, b)
            return func(input, *args, **kwargs)
        dims = [dim] if isinstance(dim, int) else dim or range(input.dim())
        x, taken = input, dict[int, Tensor]()
        for d in (d % x.dim() - x.dim() for d in dims):
            kept = self._kept(input, d)
            if kept is not None:
                x, taken[d] = gathered(x, d, kept), kept
        y = func(x, *args, **kwargs)
        for d, kept in taken.items() if name in SOFTMAXES else ():
            y = spread(y, d, kept, input.shape[d])
        return y


class MaskedForward:
    """The forward of one module with its statistics over the kept channels; sits on the instance, not on the class."""

    def __init__(self, module: nn.Module, path: str, kept: Kept) -> None:
        self.module, self.path, self.kept = module, path, kept

    @classmethod
    def put_on(cls, module: nn.Module, path: str, kept: Kept) -> None:
        """Let the statistics of a module that has its own forward be over these channels from now on."""
        module.forward = cls(module, path, kept)

    @staticmethod
    def take_off(module: nn.Module) -> None:
        """Give a module its own forward back, if it has another."""
        if isinstance(vars(module).get('forward'), MaskedForward):
            del module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _OverKept(self.module, self.path, self.kept):
            return type(self.module).forward(self.module, *args, **kwargs)


def unmask_statistics_(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        MaskedForward.take_off(module)


class TensorPlace(NamedTuple):
    """Where a module holds a parameter or a buffer."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        found = self.module._parameters.get(self.name)
        return cast(Tensor, self.module._buffers[self.name] if found is None else found)


class MaskedRows(NamedTuple):
    """Which rows stay along one dimension of a tensor, `(rows,)` bool."""

    place: TensorPlace
    dim: int
    live: Tensor

    def factor(self) -> Tensor:
        tensor, dim = self.place.tensor, self.dim
        shape = [1] * tensor.dim()
        shape[dim] = -1
        factor = self.live.to(tensor.device, tensor.dtype).reshape(shape)
        # twice as fast where the last dimensions are those of a kernel
        return factor.expand(*shape[:dim], *tensor.shape[dim:]).contiguous() if dim > 0 else factor


class Masker:
    """Apply a keep to one combed model again and again, as an optimizer step asks for it.

    Example:
        >>> masker = Masker(model, coupling)
        >>> masker.apply_(keep)                        # weights, statistics, norms
        >>> masker.apply_state_(keep, optimizer)       # momentum would bring removed weights back
    """

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        add_buffers_(model, coupling)
        self.model, self.coupling = model, coupling
        self._flat: Tensor | None = None
        self._rows: list[MaskedRows] = []
        self._factors: list[Tensor] = []

    @torch.no_grad()
    def fill_(self, keep: Keep) -> None:
        """Fill the removed rows with zeros, and take statistics over the kept channels, where the keep is a new one."""
        flat = torch.cat([keep[g.name] for g in self.coupling.groups]) if self.coupling.groups else torch.empty(0)
        if self._flat is not None and torch.equal(flat, self._flat):
            return
        self._rows, self._factors = [], []
        modules = dict(self.model.named_modules())
        unmasked = {(each.tensor, each.dim) for each in self.coupling.fixes.unmasked}
        for name, dims in kept_rows(self.coupling, keep).items():
            path, _, attribute = name.rpartition('.')
            place = TensorPlace(modules[path], attribute)
            for dim, live in dims.items():
                if (name, dim) not in unmasked:
                    tensor = writable_(place.tensor)
                    tensor.index_fill_(dim, (~live).nonzero().flatten().to(tensor.device), 0)  # 0 * nan is not 0
                    self._rows.append(MaskedRows(place, dim, live))
        self._flat = flat.clone()
        self._mask_statistics(keep)

    def factors(self, keep: Keep) -> list[tuple[Tensor, Tensor]]:
        """Return `(tensor, factor)` for all that is masked, factors of 0 and 1; kept until the keep changes.

        A product is an order of magnitude faster than filling rows, above all along any but the first dimension; the
        rows are filled once, when the keep changes. Tensors are read anew at each call: others may have replaced them.
        """
        self.fill_(keep)
        self._factors = self._factors or [rows.factor() for rows in self._rows]
        return [(writable_(rows.place.tensor), factor) for rows, factor in zip(self._rows, self._factors, strict=True)]

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

    def _mask_statistics(self, keep: Keep) -> None:
        flat = torch.from_numpy(self.coupling.flat(keep))
        by_module: dict[str, dict[Site, Tensor]] = {}
        alone: dict[str, dict[tuple[CodePlace, int], tuple[Tensor, Tensor]]] = {}
        for statistic in self.coupling.fixes.statistics:
            units = torch.from_numpy(self.coupling.axes[statistic.axis])
            kept = (units < 0) | flat[units.clamp(min=0)]
            sites = by_module.setdefault(statistic.place.module, {})
            site = Site(statistic.place, statistic.dim, len(kept))
            if statistic.alone and not bool(kept.all()):
                alone.setdefault(statistic.place.module, {})[site[:2]] = units, kept
            if not torch.equal(sites.setdefault(site, kept), kept):
                where = statistic.place.module or 'the model itself'
                raise SlimError(f'one line of {where} takes statistics over two different sets of {len(kept)} channels')
        unmask_statistics_(self.model)
        partly: dict[str, Kept] = {}
        for path, sites in by_module.items():
            removed = {site: kept.nonzero().flatten() for site, kept in sites.items() if not bool(kept.all())}
            if removed:
                names = path.split('.')
                outer = ('.'.join(names[:depth]) for depth in range(len(names)))
                fused = (each for each in outer if isinstance(self.model.get_submodule(each), FUSED))
                own = Kept(removed, alone.get(path, {}))
                partly = {key: Kept() for key in fused} | partly | {path: own}
        for path, own in partly.items():
            MaskedForward.put_on(self.model.get_submodule(path), path, own)


def add_buffers_(model: nn.Module, coupling: Coupling) -> None:
    """Give a copy of a model that was made before combing the buffers that combing added."""
    register_plain_(model, coupling.tensors)
    give_kept_(model, coupling.fixes.computed)


def kept_rows(coupling: Coupling, keep: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return which rows stay, a BoolTensor by tensor and dimension; only where some go."""
    live: dict[str, dict[int, Tensor]] = {}
    for group in coupling.groups:
        gone = ~keep[group.name]
        if not bool(gone.any()):
            continue
        for member in group.members:
            dims = live.setdefault(member.tensor, {})
            if member.dim not in dims:
                dims[member.dim] = torch.ones(coupling.tensors[member.tensor].shape[member.dim], dtype=torch.bool)
            dims[member.dim][member.index[gone].flatten()] = False
    return live


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those without storage in the state dict included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def mask_(model: nn.Module, coupling: Coupling, keep: Mapping[str, Tensor]) -> None:
    """Mask a model that was combed, or a copy of it, in place: then it computes what the slimmed model computes.

    Raises:
        ValueError: if the keep does not fit.

    Example:
        >>> keep = coupling.keep()
        >>> keep['conv1'][::2] = False
        >>> mask_(model, coupling, keep)
        >>> float(model.conv1.weight[::2].detach().abs().sum())
        0.0
    """
    coupling.check(keep)
    forget_(model, coupling.caches)  # made of all channels
    Masker(model, coupling).fill_(dict(keep))
