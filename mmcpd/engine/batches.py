"""The batches of a loop that counts iterations, from any place on: the same ones, with the same random numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from mmengine.dataset import InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from mmcpd.engine.plain_states import Place, Plain, plain_states, set_plain_states


class Batches:
    """Draw batches without end, as the iterator of MMEngine's `IterBasedTrainLoop`, which it takes the place of.

    MMEngine's begins at a new seed when a run is resumed: samplers that draw from torch's generator give other batches
    then, and augmentation other pictures. This one begins the pass with the states that it began with, goes to its
    place in it, and sets the states of the checkpoint right before the next batch is drawn.

    Args:
        loader: The loader of training data.
        discarded: How many batches the loop will draw and drop before the first that it trains on.

    Example:
        >>> batches = Batches(DataLoader(range(4), shuffle=True, batch_size=2))
        >>> _ = next(batches)
        >>> place, states, second = batches.place, plain_states(), next(batches)
        >>> again = Batches(DataLoader(range(4), shuffle=True, batch_size=2))
        >>> again.resume(place, states)
        >>> bool((next(again) == second).all())
        True
    """

    def __init__(self, loader: DataLoader, discarded: int = 0) -> None:
        self._loader, self._discarded = loader, discarded
        self._iterator: Iterator[Any] | None = None
        self._passes = self._drawn = self._to_skip = 0
        self._start: Plain | None = None  # as the pass shall begin, or did
        self._states: Plain | None = None  # of the checkpoint, until they are set
        for sampler in samplers_of(self._loader):
            if isinstance(sampler, InfiniteSampler) and not hasattr(sampler, 'skip'):
                # Such versions of MMEngine had an iterator made, and workers drew: its end ends this stream.
                sampler.indices = sampler._indices_of_rank()

    @property
    def place(self) -> Place:
        """Where it is; `resume` goes there."""
        return Place(self._passes, self._drawn, self._start or plain_states())

    def resume(self, place: Place | None, states: Plain) -> None:
        """Go to a place, once the first batch is drawn, and set `states` right before; None: begin as a new run."""
        self._states = states
        if place is not None:
            self._passes, self._to_skip, self._start = place.passes, place.drawn, place.start

    def skip_iter(self, count: int) -> None:
        """Pass over batches of a run that is resumed, in which nothing says where it was."""
        if self._states is None:
            self._to_skip = count

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        if self._discarded and self._states is not None:
            self._discarded -= 1
            return None
        if self._iterator is None:
            self._begin()
        if self._states is not None:
            set_plain_states(self._states)
            self._states = None
        return self._draw(load=True)

    def _begin(self) -> None:
        if self._start is not None:
            set_plain_states(self._start)
        if self._passes:
            self._set_epoch()
        count, self._to_skip = self._to_skip, 0
        sampler = self._skipping_sampler()
        if count and sampler is not None:
            sampler.skip(count * (self._loader.batch_size or 1))
            self._drawn, count = count, 0
        self._start = plain_states()
        self._iterator = iter(self._loader)
        for _ in range(count):
            self._draw(load=False)

    def _draw(self, load: bool) -> Any:
        """Draw a batch, of a new pass where this one is over; without `load` only its indices, if that can be."""
        assert self._iterator is not None
        single = self._loader.num_workers == 0 and not isinstance(self._loader.dataset, IterableDataset)
        skip = getattr(self._iterator, '_next_index', None) if single and not load else None
        try:
            batch = next(self._iterator) if skip is None else skip()
        except StopIteration:
            self._passes, self._drawn, self._start = self._passes + 1, 0, plain_states()
            self._set_epoch()
            if self._loader.num_workers:
                time.sleep(2)  # MMEngine's: new workers may deadlock with those that end
            self._iterator = iter(self._loader)
            batch = next(self._iterator)
        self._drawn += 1
        return batch

    def _set_epoch(self) -> None:
        """Tell the sampler the pass, which is its seed in MMEngine's `DefaultSampler`."""
        for sampler in samplers_of(self._loader):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(self._passes)
                return

    def _skipping_sampler(self) -> Any:
        """Return the sampler that passes over indices by itself, if a batch has a fixed number of them."""
        inner = self._loader.batch_sampler
        sampler = inner.sampler if type(inner) is BatchSampler else self._loader.sampler
        return sampler if self._loader.batch_size and hasattr(sampler, 'skip') else None


def samplers_of(loader: DataLoader) -> tuple[Any, ...]:
    """Return what draws the indices of a loader, of which only one is its own."""
    return loader.sampler, getattr(loader.batch_sampler, 'sampler', None)


def reseed(loader: DataLoader, built: int | None, resumed: int | None) -> None:
    """Give samplers and workers the seed of the run that is resumed, where they have the one they were built with.

    Where a config says no seed, MMEngine draws one; it reads that of the run that is resumed after the loader is built.
    """
    for sampler in samplers_of(loader):
        if getattr(sampler, 'seed', None) == built:
            setattr(sampler, 'seed', resumed)  # noqa: B010 - torch's samplers have none
    begin = loader.worker_init_fn
    if isinstance(begin, partial) and begin.keywords.get('seed') == built:
        loader.worker_init_fn = partial(begin, seed=resumed)
