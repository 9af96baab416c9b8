"""Find out in which dimension of an activation the samples of a batch lie, by changing one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..example import Example
from ..layer_calls import LayerCall, LayerCalls
from ..modes import run_once
from ..nested import map_tensors, tensors_in
from ..slim.compare import evaluating
from ..slim.copying import attributes_kept
from .cut_calls import CutCalls
from .gates import Cut, Gates, untouched

_REFUSALS = (RuntimeError, ValueError, LookupError, AssertionError)  # of a model that takes no larger batch


@dataclass(frozen=True)
class Layout:
    """Where samples lie: in dimension `dim`, as its outer part (N * windows) or its inner one (tokens * N).

    Without `dim` they cannot be told apart, and `reason` says why.
    """

    dim: int | None
    inner: bool = False
    reason: str = ''


FIRST = Layout(0)
CONSTANT = Layout(None, reason='its activations are the same for all inputs')
TABLE = Layout(None, reason='no linear layer and no convolution is called with rows of it')
UNCHANGED = Layout(None, reason='no input of the example has values that could be changed')
MIXED = Layout(None, reason='samples of a batch change one another there, or lie in more than one dimension')
Seen = dict[Cut, list[Tensor]]  # the activations of each cut, summed over channels


@contextmanager
def scoring(model: nn.Module, gates: Gates) -> Iterator[None]:
    """Run a model as it is scored, in eval mode and with gradients, and put everything back afterwards.

    Attributes too: what a forward leaves there has a history by now. Parts under a checkpoint run plainly.

    Inside, tensors of the cut have `requires_grad=True`, so that a weight that is computed from one shows it.
    """
    names = {cut.tensor for cut in gates.cuts}
    frozen = [p for name, p in model.named_parameters() if name in names and not p.requires_grad]
    kept = untouched(model, weights=False), attributes_kept(model), evaluating(model), torch.enable_grad(), run_once()
    with ExitStack() as stack:
        for each in kept:
            stack.enter_context(each)
        for parameter in frozen:
            stack.callback(parameter.requires_grad_, False)
            parameter.requires_grad_(True)
        yield


def find_layouts(model: nn.Module, gates: Gates, example: Example) -> dict[Cut, Layout]:
    """Return for each cut where samples lie, or why they cannot be told apart.

    The example runs once as it is, and three times with two of it in a batch: as they are, and with either changed.
    What changes with the first alone belongs to it. Nothing of the kind is found where activations do not depend on the
    input (a table of positions), where no layer uses a tensor of the cut (positions that are added), or where the model
    takes no larger batch. Where there is no other input, integers (tokens) change places.

    Raises:
        torch.OutOfMemoryError: a batch of two examples does not fit: comb with a smaller example.
    """
    calls = CutCalls(gates, model)
    batch = next((len(t) for t in tensors_in(example.inputs) if t.dim()), 1)
    with scoring(model, gates):
        _run(model, calls, example)  # all passes: what only training calls is seen as well
        example = replace(example, also=())
        beside = dict.fromkeys(calls.unseen(), TABLE)
        try:
            tokens = not any(tensor.is_floating_point() for tensor in tensors_in(example.inputs))
            doubled = [map_tensors(example.inputs, partial(_doubled, n, tokens)) for n in (None, 0, 1)]
            inputs = [_samples_doubled(each) for each in doubled]
            plain, *changed = (_run(model, calls, replace(example, inputs=each)) for each in inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            text = first_line(error)
            why = f'the model takes no batch of twice its example ({type(error).__name__}: {text})'
            return dict.fromkeys(calls.seen, Layout(None, reason=why)) | beside
    if any(all(map(torch.equal, *map(tensors_in, (inputs[0], each)))) for each in inputs[1:]):
        return dict.fromkeys(calls.seen, UNCHANGED) | beside
    each = {cut: [_layout(batch, *runs) for runs in _together(cut, plain, *changed)] for cut in plain}
    return dict.fromkeys(calls.seen, FIRST) | {cut: _common(layouts) for cut, layouts in each.items()} | beside


def _run(model: nn.Module, calls: CutCalls, example: Example) -> Seen:
    seen: Seen = {}

    def note(call: LayerCall) -> Tensor:
        out = call.run()
        for place in calls.places(call):
            activation = (call.input if place.in_input else out).detach()
            seen.setdefault(place.cut, []).append(activation.sum(place.channel, keepdim=True))
        return out

    with LayerCalls(model, note, norms=True):
        example.run_all(model)
    return seen


def _samples_doubled(value: Any) -> Any:
    """Return the inputs with each list of samples, which stand beside a batch of tensors, twice as long."""
    if isinstance(value, dict):
        return {key: _samples_doubled(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_samples_doubled(each) for each in value)
    beside = isinstance(value, list) and not any(isinstance(each, Tensor | list | tuple | dict) for each in value)
    return value * 2 if beside else value


def _doubled(which: int | None, tokens: bool, tensor: Tensor) -> Tensor:
    """Return a batch of twice the tensor, one of the two changed, along the first dimension."""
    parts = [tensor, tensor]
    if which is not None and tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
        parts[which] = tensor + (1 + tensor.abs().mean()) * noise
    elif which is not None and tokens and tensor.dim() and not tensor.is_complex() and tensor.dtype != torch.bool:
        parts[which] = tensor.flatten().roll(1).view(tensor.shape)  # such values are allowed at other places too
    return torch.cat(parts) if tensor.dim() else tensor


def _together(cut: Cut, *runs: Seen) -> list[tuple[Tensor, ...]]:
    """Return a cut's activations call by call; none where runs had different calls."""
    calls = [run.get(cut, []) for run in runs]
    shapes = [[t.shape for t in seen] for seen in calls]
    return list(zip(*calls, strict=True)) if all(s == shapes[0] for s in shapes) else []


def _layout(batch: int, plain: Tensor, first: Tensor, second: Tensor) -> Layout:
    """Return where two samples of `batch` pictures each lie, given what changes with the first and with the second."""
    if torch.equal(plain, first) and torch.equal(plain, second):
        return CONSTANT
    for dim, size in enumerate(plain.shape):
        if size % (2 * batch):
            continue
        others = [d for d in range(plain.dim()) if d != dim]
        for inner in (False, True):
            halves = []
            for run in (first, second):
                changed = plain.ne(run)
                changed = changed.any(others) if others else changed  # (size,)
                parts = changed.unflatten(0, (-1, 2, batch) if inner else (1, 2, -1))
                halves.append([bool(part.any()) for part in parts.unbind(1)])
            if halves == [[True, False], [False, True]]:
                return Layout(dim, inner)
    return MIXED


def _common(layouts: list[Layout]) -> Layout:
    """Return the one layout of all calls, if they have one."""
    if not layouts:
        return Layout(None, reason='its layer is called otherwise with other inputs')
    return layouts[0] if len(set(layouts)) == 1 else MIXED
