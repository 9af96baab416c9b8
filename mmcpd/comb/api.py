"""The public entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .build import build, coupled_by_groups, default_forward
from .groups import Comb
from .rules import check_strict
from .trace import run

HEADS = ('dim', 'head')


def comb(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    forward: Callable[..., Any] | None = None,
    heads: str = 'dim',
    ignore: Sequence[str] = (),
    strict: bool = False,
    *,
    trial: bool = True,
) -> Comb:
    """Find the coupling groups of any model by observing one forward pass.

    The observed pass takes as long as about two plain ones. Where all groups of a grouped convolution hang together
    it runs once more, and where slimming takes more than slicing a trial follows.

    Args:
        model: it is run in eval mode without gradients, and left as it was.
        inputs: one input, or a tuple of the arguments; a batch of one is enough.
        forward: `callable(model, *inputs)`; the default calls the model.
        heads: what an attention gives up: `dim`, the same width index in each head, or `head`, whole heads.
        ignore: patterns (`fnmatch`) of group names that must not be pruned.
        strict: raise on operations without a rule, instead of freezing what goes through them.
        trial: end with the safety net (see `mmcpd.prune.trial`) where anything hangs on a width, and freeze what
            fails it; without it `slim` raises on a model whose sizes cannot follow.

    Raises:
        CombError: if the output holds no tensor, or one that is not finite where a trial is held; with `strict`, if
            an operation has no rule.
        ValueError: for an unknown `heads`, or an `ignore` that matches nothing.

    Source: arXiv 2408.03046, section III-A; the algorithm is described in `docs/design.md`.

    Example:
        >>> c = comb(torchvision.models.resnet18(), torch.rand(1, 3, 224, 224))
        >>> print(c)
    """
    if heads not in HEADS:
        raise ValueError(f'heads must be one of {HEADS}, not {heads!r}')
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    trace = run(model, inputs, forward or default_forward, heads)
    if coupled := coupled_by_groups(trace):
        trace = run(model, inputs, forward or default_forward, heads, coupled)
    if strict:
        check_strict(trace)

    def combed(faults: Mapping[str, str]) -> Comb:
        found = build(model, trace, ignore, faults)
        found.inputs, found.forward = inputs, forward or default_forward
        return found

    from ..prune.trial import could_fail, faults_of  # the safety net cuts for real: the one arrow that points back

    found = combed({})
    faults = faults_of(model, found) if trial and (trace.adapts or could_fail(model, found)) else {}
    return combed(faults) if faults else found
