"""Score the units of a model that nobody trains, from batches of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial

import torch
from torch import Tensor, nn

from ..coupling import Coupling
from ..errors import PruneError
from ..example import arguments, check_filled, own
from ..nested import tensors_in
from .finite import check_finite
from .importance import averaged, build_importance


def score(
    model: nn.Module,
    coupling: Coupling,
    batches: Iterable[Tensor | tuple[object, ...]],
    *,
    importance: str | Mapping[str, object] = 'gauss_newton',
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Score all units from batches of inputs alone, without labels or an optimizer: raw scores, (units,) per group.

    The model runs in eval mode as it was combed, `coupling.example.forward(model, *inputs)`, and is left bit by bit as
    it was. Several processes, each with batches of its own, get the same scores.

    Args:
        model: the very model that was combed.
        coupling: what combing found.
        batches: inputs, each a tensor (N, C, H, W) or a tuple of the forward's arguments.
        importance: one that needs no loss: 'gauss_newton', 'magnitude' or 'random'; with options it is a dict.
        seed: of the importance's random numbers.
        progress: called after each batch with (done, total); total is 0 where `batches` has no length.

    Raises:
        ValueError: an importance that needs a loss, groups that cannot be scored, or no batch with a finite score.
        PruneError: a weight or a picture is not finite; infinities that the forward takes (masks) may stay.

    Example:
        >>> from mmcpd.prune import normalize, score, select, shares
        >>> scores = normalize(score(model, coupling, [images]), coupling, coupling.keep(), by='macs')
        >>> chosen = select(scores, coupling, coupling.keep(), {'macs': 0.5})
        >>> shares(coupling, chosen)['macs'] <= 0.5
        True
    """
    found = build_importance(importance, coupling.groups, seed=seed)
    if found.every_iteration and not found.needs_outputs:
        name = importance if isinstance(importance, str) else importance['type']
        raise ValueError(f"importance '{name}' needs a loss: score with 'gauss_newton', 'magnitude' or 'random' here")
    check_finite(model)
    found.check(model, coupling.example)
    if not found.every_iteration:
        found.accumulate(model)
    else:
        total = len(batches) if isinstance(batches, Sized) else 0
        for done, batch in enumerate(batches, 1):
            inputs = arguments(batch)
            _check_batch(inputs, done - 1)
            found.accumulate(model, closure=partial(_outputs, model, coupling, inputs, done - 1))
            if progress is not None:
                progress(done, total)
    scores = averaged(found, next(model.parameters()).device)
    if scores is None:
        raise ValueError(
            f'nothing was scored: {found.skipped} batches, none with a finite score; give batches of inputs'
        )
    return scores


def _check_batch(inputs: tuple[object, ...], number: int) -> None:
    """Refuse a batch without a picture, and one with a NaN."""
    check_filled(inputs, number)
    _refuse(inputs, number, torch.isnan)


def _plain_tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of arguments, not those of data samples: what they hold may be no number."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _plain_tensors(each)


def _refuse(inputs: tuple[object, ...], number: int, spoils: Callable[[Tensor], Tensor]) -> None:
    """Refuse a picture with such a value: it would spoil the score, and all that is fitted to it later."""
    for tensor in _plain_tensors(inputs):
        if tensor.dim() and bool((spoilt := spoils(tensor)).any()):
            picture = int(spoilt.reshape(len(tensor), -1).any(1).nonzero()[0])
            raise PruneError(f'picture {picture} of batch {number} (from 0) is not finite: leave it out, or mend it')


def _outputs(model: nn.Module, coupling: Coupling, inputs: tuple[object, ...], number: int) -> list[object]:
    """Run a batch; infinite values in it are refused where an output is not finite either: masks have some."""
    outputs = coupling.example.forward(model, *own(inputs))
    if not all(bool(torch.isfinite(each).all()) for each in tensors_in(outputs)):
        _refuse(inputs, number, torch.isinf)
    return [outputs]
