"""The public entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..compat import call
from ..coupling import Coupling
from ..errors import CombError, first_line
from ..example import Cache, Example, arguments
from ..fixes import Fixes
from ..slim.computed import buffer_name, give_all_, give_kept_
from ..slim.copying import restored
from ..slim.plain_tensors import plain_tensors, register_plain_, unregister_
from ..slim.shape_attributes import DESCRIBED
from ..slim.trial import FAILURES, Outcome, trial_of
from .computed import computed_in
from .conflicts import couple_conflicts_
from .grouping import coupled_by_groups, frozen_by_groups, group, heads_of
from .mentions import is_special, mentioned, names_in
from .observe import observe
from .record import Note, Record
from .rules import OPERATIONS, check_strict
from .size_arguments import INTEGRAL
from .trace import Policy
from .training import Trained, compared, newly_read, repeatable
from .transparent import several

HEADS = ('dim', 'head')
UNUSED = ('freeze', 'leave')
HOOKS = (
    'register_hook', 'register_full_backward_hook', 'register_full_backward_pre_hook', 'register_multi_grad_hook',
    'register_post_accumulate_grad_hook',
)  # fmt: skip


def comb(
    model: nn.Module,
    inputs: Tensor | tuple[object, ...],
    *,
    forward: Callable[..., object] | None = None,
    also: Sequence[Callable[..., object]] = (),
    heads: str = 'dim',
    ignore: Sequence[str] | str = (),
    strict: bool = False,
    unused: str = 'freeze',
    trial: bool = True,
) -> Coupling:
    """Find the coupling groups of any model by observing one forward pass.

    The observed pass takes as long as about two plain ones. Where all groups of a grouped convolution are coupled, or
    whole heads go, it runs once more, and where slimming takes more than slicing a trial follows.

    Args:
        model: it is run in eval mode without gradients, and left as it was, but that plain tensors in attributes which
            meet channels that can go become buffers outside of the state dict, so that they can be cut, and that
            modules which compute such channels without a weight get a buffer with those that they give out.
        inputs: one input, or a tuple of the arguments; a batch of one is enough.
        forward: `callable(model, *inputs)`; the default calls the model.
        also: further passes, called alike, that must work on the slim model too but do not count in its cost: side
            heads that only training runs.
        heads: what an attention gives up: `dim`, the same width index in each head, or `head`, whole heads.
        ignore: patterns (`fnmatch`) of group names that must not be pruned, or one of them.
        strict: raise on operations without a rule, instead of freezing what goes through them.
        unused: what to do with channels that layers may use which never ran: `freeze` them, or `leave` them prunable;
            see `Coupling.unused`. Where anything did not run, a forward in training mode is observed too if it runs
            more.
        trial: end with the safety net (see `mmcpd.slim.trial`) where anything depends on a width, and freeze what
            fails it; without it `slim` raises on a model whose sizes cannot follow.

    Raises:
        CombError: if the output holds no tensor, or one that is not finite where a trial is held; with `strict`, if
            an operation has no rule; if a module waits for its first forward to get its shapes, or if a dictionary is
            given to a model that takes its entries.
        ValueError: for an unknown `heads` or `unused`, or an `ignore` that matches nothing.

    Source: arXiv 2408.03046, section III-A; the algorithm is described in `docs/design.md`.

    Example:
        >>> coupling = comb(model, images)
        >>> [(group.name, group.units) for group in coupling.groups]
        [('conv1', 8), ('conv2', 4)]
    """
    if heads not in HEADS:
        raise ValueError(f'heads must be one of {HEADS}, not {heads!r}')
    if unused not in UNUSED:
        raise ValueError(f'unused must be one of {UNUSED}, not {unused!r}')
    ignore = [ignore] if isinstance(ignore, str) else ignore
    example = Example(arguments(inputs), forward or call, tuple(also))
    watched = example  # what is observed; the passes of `example` are compared, too
    caches: list[Cache] = []

    def observed(policy: Policy) -> Record:
        with restored(model, caches), explaining(model, example):
            return observe(model, watched, policy._replace(leave_unused=unused == 'leave'))

    def grouped(faults: Mapping[str, str] | None = None) -> Coupling:
        return replace(group(model, record, example, ignore, faults), caches=tuple(caches))

    trained = Trained(example.forward)
    if mentioned(model, _trains):
        with explaining(model, example):
            further = compared(model, example, trained)
        if further.runs:
            watched = replace(example, also=(*example.also, trained))
            example = watched if further.reads or not further.draws else example
    record = observed(policy := Policy())
    plain = record.plain & plain_tensors(model).keys()
    computed = {buffer_name(each.module): each for each in computed_in(record)}
    if buffers := plain | computed.keys():
        register_plain_(model, plain)
        give_kept_(model, computed.values())
        record = observed(policy)
        if frozen := buffers - record.table.free_tensors(buffers):
            unregister_(model, frozen & plain)
            give_all_(model, [computed[name].module for name in frozen & computed.keys()])
            record = observed(policy)
    if record.unused and trained not in watched.also and newly_read(model, example, trained, record.unread):
        example = watched = replace(example, also=(*example.also, trained))
        record = observed(policy)
    if lines := several(record):  # where one line makes several numbers, none can stand
        with suppress(*FAILURES):  # code that asks for a plain number gets one, as it did
            record, policy = observed(wider := policy._replace(transparent=lines)), wider
    whole = heads_of(record) if heads == 'head' else None
    if whole is not None:
        record = observed(policy := policy._replace(whole_heads=whole))
    if narrowed := coupled_by_groups(record):
        record = observed(policy := policy._replace(narrowed=narrowed))
    if frozen_groups := frozen_by_groups(record) - narrowed:
        other = observed(wider := policy._replace(narrowed=narrowed | frozen_groups))
        if group(model, other, example, ()).units > group(model, record, example, ()).units:
            record, policy = other, wider
    while record.divisors > policy.divisors or _more_pictures(record, policy):
        policy = policy._replace(divisors=frozenset(record.divisors), pictures=record.pictures)
        record = observed(policy)
    if strict:
        check_strict(record)
    couple_conflicts_(model, record, example)
    found = grouped()
    gradients = trial and bool(found.groups) and gradients_are_due(model, record)
    due = gradients or (trial and trial_is_due(model, record, found))
    unseen = gradients and trained not in example.also and mentioned(model, _trains)
    if unseen and repeatable(model, example, trained):
        tried = trial_of(model, replace(found, example=replace(example, also=(*example.also, trained))), gradients=True)
    else:
        tried = trial_of(model, found, gradients=gradients) if due else Outcome({})
    found = grouped(tried.faults) if tried.faults else found
    return replace(found, untried=tried.untried)


def _more_pictures(record: Record, policy: Policy) -> bool:
    return int((record.pictures > 0).sum()) > (0 if policy.pictures is None else int((policy.pictures > 0).sum()))


@contextmanager
def explaining(model: nn.Module, example: Example) -> Iterator[None]:
    """Say in one line what a model needs that cannot be run as it is."""
    for path, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            kind = type(module).__name__
            raise CombError(
                f'{path or "the model itself"} ({kind}) has no shapes yet: run the model once, then comb it'
            )
    try:
        yield
    except FAILURES as error:
        if example.forward is call and len(example.inputs) == 1 and isinstance(example.inputs[0], Mapping):
            raise CombError(
                f'the model does not take a dictionary as its one input ({first_line(error)}): give comb '
                '`forward=lambda model, inputs: model(**inputs)`'
            ) from error
        raise


def trial_is_due(model: nn.Module, record: Record, found: Coupling) -> bool:
    """Say whether slimming takes more than slicing, so that a trial can tell something.

    In a network of convolutions, linear layers and batch norms it does not: nothing there asks how wide a tensor is.
    A function that was put on an instance, or a hook, may use another module than the copy's, and code that mentions a
    layer's width may count with it where nothing sees it.
    """
    plain = all(op in OPERATIONS and OPERATIONS[op].plain for op in record.operations)
    seen = not plain or record.notes or found.fixes != Fixes() or any(map(is_special, model.modules()))
    return bool(seen or mentioned(model, lambda name: name in DESCRIBED or name in INTEGRAL))


def gradients_are_due(model: nn.Module, record: Record) -> bool:
    """Say whether the trial compares gradients: a function has its own backward, or a statistic may be recomputed.

    Masking takes statistics over the kept channels while a forward runs. What runs in the backward pass takes them over
    all: a function's own formula, a hook on a tensor, or a part that `torch.utils.checkpoint` runs again, unless that
    is a module's own forward. Most models skip these where no gradient is needed, so they are seen by name.
    """
    places = [seen.site.place for seen in record.statistics if seen.axis is not None]
    parts = {p.module for p in places if not p.function.endswith('.forward') or len(p.instructions) > 1}
    around = {path[:end] for path in parts for end in range(len(path) + 1) if f'{path}.'[end] == '.' or not end}
    kinds: set[Any] = {type(model.get_submodule(path)) for path in around}
    recomputed = any(map(_recomputes, (name for kind in kinds for name in names_in(kind))))
    hooked = any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())
    return Note.OWN_BACKWARD in record.notes or recomputed or hooked or mentioned(model, lambda name: name in HOOKS)


def _trains(name: str) -> bool:
    return name == 'training'


def _recomputes(name: str) -> bool:
    return 'checkpoint' in name.lower()
