"""Find the modules that compute channels without a weight: encodings of positions, which meet channels of layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..fixes import ComputedChannels
from ..nested import tensors_in
from ..slim.computed import CHANNELS
from ..slim.weights import all_tensors
from .record import Record
from .trace import Run


def note_computed_(run: Run, path: str, module: nn.Module, given: object, out: object) -> None:
    """Note which dimensions a module without a tensor puts out that are as long as none of its inputs'.

    Those that an input has are pictures, places and tokens, but for channels of layers: these would still be known, had
    they come through. Of modules inside each other that compute as many channels the innermost counts.
    """
    of_torch = f'{type(module).__module__}.'.startswith('torch.nn.')
    if not path or of_torch or hasattr(module, CHANNELS) or all_tensors(module):
        return
    if not isinstance(out, Tensor):
        run.record.computed[path] = set()
        return
    inputs = [pair for each in tensors_in(given) for pair in zip(each.shape, run.axes(each), strict=True)]
    sizes = {size for size, axis in inputs if axis is None}
    found = {
        ComputedChannels(path, dim, size)
        for dim, (size, axis) in enumerate(zip(out.shape, run.axes(out), strict=True))
        if axis is None and size > 1 and size not in sizes
    }
    computed = run.record.computed
    inside = {each.width for other, its in computed.items() if other.startswith(f'{path}.') for each in its}
    found = {each for each in found if each.width not in inside}
    computed[path] = computed.get(path, found) & found  # in all of its calls


def computed_in(record: Record) -> list[ComputedChannels]:
    """Return the modules without a tensor whose channels met those of layers, as far as it is clear which they are."""
    wide = ([each for each in found if each.width in record.foreign] for found in record.computed.values())
    return [found[0] for found in wide if len(found) == 1]
