"""The public entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from ..compat import call
from ..example import Example, arguments
from ..slim.copying import restored
from .heads import Head, plan, rotated
from .observe import observe
from .report import HeadKind, Rotated, Rotations, SkippedHeads
from .trial import faults_of, write_


def rotate_(
    model: nn.Module, inputs: Tensor | tuple[object, ...], *, forward: Callable[..., object] | None = None
) -> Rotations:
    """Sort the dimensions inside the attention heads of a model by what they carry, in place; its outputs stay.

    A head's queries and keys may be turned together, and so may its values and the columns of the projection behind
    them. In the new basis the first dimension carries most, so that pruning the same dimensions of every head costs
    least. No data is needed: the inputs only show how the forward runs. Heads are found by observing it, and outputs
    are compared in float64 before anything is written.

    What forbids it is left alone and reported: norms, rotary embeddings, position tables, convolutions or pooling on
    queries, keys or values, a second reader of one of them, keys or values that several heads share.

    Call it before or after `comb`, before scores are taken, never on a masked model: its zeros would be turned too.

    Args:
        model: it is run in eval mode without gradients; its parameters stay the same objects, type and device.
        inputs: one input, or a tuple of the arguments; a batch of one is enough.
        forward: `callable(model, *inputs)`; the default calls the model.

    Raises:
        ValueError: if a weight or bias of a head is not finite; nothing is written then.

    Source: the best product of rank r is the truncated singular value decomposition (Eckart and Young, 1936).

    Example:
        >>> encoder = nn.TransformerEncoderLayer(8, 2, 16).eval()
        >>> tokens = torch.rand(5, 1, 8)
        >>> before = encoder(tokens)
        >>> print(rotate_(encoder, tokens))
        rotated 2 heads of 1 attention
        >>> torch.allclose(encoder(tokens), before, atol=1e-5)
        True
    """
    example = Example(arguments(inputs), forward or call)
    with restored(model):
        found = plan(observe(model, example))
    tensors = dict(model.named_parameters())
    for name in sorted({name for head in found.heads for name in head.names}):
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f'{name} has values that are not finite; load weights that are')
    faults = {(f.attention, f.kind): f.reason for f in faults_of(model, example, found.heads)} if found.heads else {}
    heads = [head for head in found.heads if (head.attention, head.kind) not in faults]
    write_(tensors, rotated(tensors, heads))
    wrong = ((head, faults.get((head.attention, head.kind))) for head in found.heads)
    failed = [SkippedHeads(head.attention, head.kind, 1, why) for head, why in wrong if why]
    return Rotations(_rotated(heads), _added((*found.skipped, *failed)))


def _rotated(heads: Sequence[Head]) -> tuple[Rotated, ...]:
    parts: dict[tuple[str, HeadKind, int], list[Head]] = {}
    for head in heads:
        parts.setdefault((head.attention, head.kind, len(head.left.index)), []).append(head)
    return tuple(
        Rotated(
            attention, kind, tuple(sorted({n for h in same for n in (h.left.weight, h.right.weight)})), len(same), width
        )
        for (attention, kind, width), same in parts.items()
    )


def _added(parts: Iterable[SkippedHeads]) -> tuple[SkippedHeads, ...]:
    """Return one entry for all heads that were skipped for one reason."""
    counts: dict[tuple[str, HeadKind, str], int] = {}
    for part in parts:
        key = part.attention, part.kind, part.reason
        counts[key] = counts.get(key, 0) + part.heads
    return tuple(SkippedHeads(where, kind, heads, reason) for (where, kind, reason), heads in counts.items())
