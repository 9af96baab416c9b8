"""Note which rows slimming kept of buffers outside of the state dict: no checkpoint holds their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor, nn

NOTE = '_kept_rows'  # on a slimmed module: the rows of the first dense model, by the buffer's name
Rows: TypeAlias = list[list[int] | None]  # by dimension; None where all are kept


def note_rows_(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Note on the modules of a slimmed model which rows of their non-persistent buffers were kept.

    Args:
        model: the slimmed model; a note of an earlier slimming is composed with the new one.
        kept: BoolTensors by name and dimension, True = kept.
    """
    for name, dims in kept.items():
        path, _, local = name.rpartition('.')
        module = model.get_submodule(path)
        if local in module._non_persistent_buffers_set:
            rows: Rows = list(noted_rows(module).get(local) or [None] * module.get_buffer(local).dim())
            for dim, live in dims.items():
                new, old = live.nonzero().flatten().tolist(), rows[dim]
                rows[dim] = new if old is None or len(old) != len(live) else [old[row] for row in new]
            set_noted_rows_(module, local, rows)


def noted_rows(module: nn.Module) -> dict[str, Rows]:
    """Return the rows that are noted on a module, by its buffers' names."""
    found: dict[str, Rows] = vars(module).get(NOTE, {})
    return found


def set_noted_rows_(module: nn.Module, name: str, rows: Rows) -> None:
    """Note which rows of a buffer are kept."""
    vars(module)[NOTE] = {**noted_rows(module), name: rows}


def are_rows(rows: object, kept: int, have: int) -> bool:
    """Say whether these are so many ascending rows of a dimension, or None for all.

    Example:
        >>> are_rows([0, 2], 2, 3), are_rows([0, 3], 2, 3), are_rows([2, 0], 2, 3)
        (True, False, False)
    """
    if rows is None:
        return kept == have
    if type(rows) is not list or len(rows) != kept or not all(type(row) is int for row in rows):
        return False
    return rows == sorted(set(rows)) and (not rows or 0 <= rows[0] <= rows[-1] < have)
