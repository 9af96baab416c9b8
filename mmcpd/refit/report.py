"""What a refit did, layer by layer, and why it left others alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..coupling import aligned


@dataclass(frozen=True)
class RefittedLayer:
    """A layer with a new weight; errors are mean squares at sampled positions, as shares of the target's variance."""

    tensor: str  # name of the weight, with its rows where they are a part of it
    before: float
    after: float
    corrected: bool  # its target holds what the sum behind it has lost so far
    alike: bool  # all taps of the kernel got the same change, because of `gram_limit`
    intercept: str  # the tensor that took up the intercept, '' where there was none


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left alone, or whose target was not corrected, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        refitted: the layers in the order in which they run.
        skipped: weights that lost rows or columns and were left alone.
        uncorrected: layers whose output ends in a sum, and whose target could not be corrected.
        masked_distance: how far the outputs of the masked model are from the dense one's on all batches: the mean
            square of the difference, as a share of the mean square.
        refitted_distance: the same after the refit.
        undone: the refit had made the distance larger, and was taken back.
        gram_bytes: what the Gram matrices of all layers took.
    """

    refitted: tuple[RefittedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    uncorrected: tuple[SkippedLayer, ...]
    masked_distance: float
    refitted_distance: float
    undone: bool
    gram_bytes: int

    @property
    def corrected(self) -> tuple[str, ...]:
        """The layers whose target held what the sum behind them had lost."""
        return tuple(layer.tensor for layer in self.refitted if layer.corrected)

    def __str__(self) -> str:
        """Return a table of the layers, and one line for each that was left alone."""
        rows: list[tuple[str, ...]] = [('layer', 'error before', 'after', 'sum corrected', 'kernel taps alike')]
        for layer in self.refitted:
            flags = ('yes' if flag else '' for flag in (layer.corrected, layer.alike))
            rows.append((layer.tensor, f'{layer.before:.3g}', f'{layer.after:.3g}', *flags))
        end = ', so the refit was undone' if self.undone else ''
        head = f'outputs differ from the dense ones by {self.masked_distance:.3g} masked, '
        memory = f'; Gram matrices took {self.gram_bytes / 2**20:,.1f} MiB'
        lines = [head + f'{self.refitted_distance:.3g} refitted{end}{memory}', '', *aligned(rows)]
        lines += [f'left alone: {layer.tensor}: {layer.reason}' for layer in self.skipped]
        lines += [f'sum not corrected: {layer.tensor}: {layer.reason}' for layer in self.uncorrected]
        return '\n'.join(lines)
