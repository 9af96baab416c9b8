"""Try whether a pass runs more of a model: a forward in training mode, or one that a caller knows."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..example import Example
from ..modes import as_trained
from ..nested import tensors_in
from ..random_state import draws
from ..slim.compare import evaluating
from ..slim.copying import restored
from .unused import Ran


@dataclass(frozen=True)
class Trained:
    """Run a forward in training mode, without dropout and with the norms' own statistics.

    Example:
        >>> bool(Trained(lambda model, images: model(images).isfinite().all())(model, images))
        True
    """

    forward: Callable[..., object]

    def __call__(self, model: nn.Module, *inputs: object) -> object:
        with as_trained(model):
            return self.forward(model, *inputs)


class _Reading(TorchDispatchMode):
    def __init__(self, ran: Ran) -> None:
        super().__init__()
        self.ran = ran

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.ran.read(func._schema.name.split('::')[-1], tensors_in([args, kwargs]))
        return func(*args, **kwargs)


def _read(model: nn.Module, example: Example) -> Ran:
    """Return what the passes of an example run; nothing else is observed."""
    ran = Ran(model)
    with restored(model), evaluating(model), _Reading(ran):
        example.run_all(model)
    return ran


def _read_by(model: nn.Module, example: Example, further: Callable[..., object]) -> Ran | None:
    """Return what another forward runs on the inputs of an example, None where it does not run."""
    try:
        return _read(model, replace(example, forward=further, also=()))
    except Exception:  # noqa: BLE001 (in a mode that nobody asked for, code may raise anything)
        return None


def unread(model: nn.Module, example: Example) -> set[str]:
    """Return the names of the parameters and buffers that no pass of an example reads; one run, nothing observed.

    Example:
        >>> unread(model, coupling.example)
        set()
    """
    return _read(model, example).unread_names


def repeatable(model: nn.Module, example: Example, further: Callable[..., object]) -> bool:
    """Say whether a further pass runs and draws no random numbers, so that two runs of it can be compared.

    Example:
        >>> repeatable(model, coupling.example, lambda model, images: model(images + torch.rand(1)))
        False
    """
    with restored(model), evaluating(model):
        try:
            return not draws(lambda: further(model, *example.inputs))
        except Exception:  # noqa: BLE001 (as above)
            return False


class Further(NamedTuple):
    """What a further pass does beyond those of an example; nothing where it does not run."""

    runs: bool  # operations that none of them runs, or more of them
    reads: bool  # parameters or buffers that none of them reads
    draws: bool  # random numbers, so that two runs of it cannot be compared


def compared(model: nn.Module, example: Example, further: Callable[..., object]) -> Further:
    """Compare a further pass with those of an example; two runs.

    Example:
        >>> compared(model, coupling.example, lambda model, images: model(images) + torch.rand(1))
        Further(runs=True, reads=False, draws=True)
        >>> compared(model, coupling.example, lambda model, images: model(images))
        Further(runs=False, reads=False, draws=False)
    """
    drawn: list[bool] = []

    def noting(forward: Callable[..., object]) -> Callable[..., object]:
        return lambda model, *inputs: drawn.append(draws(lambda: forward(model, *inputs)))

    if (ran := _read_by(model, example, noting(further))) is None:
        return Further(False, False, False)
    # Asked in the same way, for that takes operations, too.
    known = _read(model, replace(example, forward=noting(example.forward)))
    return Further(bool(ran.operations - known.operations), bool(known.unread_names - ran.unread_names), drawn[0])


def newly_read(model: nn.Module, example: Example, further: Callable[..., object], left: Set[str]) -> set[str]:
    """Return which of the parameters and buffers in `left` a further pass reads: none if it does not run.

    Example:
        >>> newly_read(model, coupling.example, lambda model, images: model.conv1(images), {'conv1.bias', 'fc.bias'})
        {'conv1.bias'}
    """
    ran = _read_by(model, example, further) if left else None
    return set() if ran is None else set(left - ran.unread_names)
