"""Cut the removed rows out of every tensor, and let the modules' attributes follow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..coupling import Coupling, Keep
from ..errors import SlimError
from ..fixes import Attr, CallSite, Equality, Expression, Input, Live, SizeRule
from .attention import REPLACEMENTS, replacement
from .call_sites import INFER, Rewrite, rewritten
from .computed import buffer_name, give_kept_
from .copying import copied, discarding
from .layout import gathered
from .mask import kept_rows, named_tensors, unmask_statistics_
from .methods import Methods
from .noted_rows import note_rows_
from .plain_tensors import plain_tensors, register_plain_
from .references import Replaced, refer_
from .shape_attributes import Layer, Shapes, described, followed, integers, local_shapes
from .size_expressions import evaluate, leaves, read_attribute, show, solve, write_attribute

_ALWAYS, _ALONE, _WRITTEN = range(3)  # ranks of sizes: of a fixed number, of an attribute alone, of a line or attribute


class SizeConflict(SlimError):
    """Two widths would have to be one number: of an attribute, or of a line that runs twice."""

    def __init__(self, message: str, missing: Sequence[Equality], module: str | None) -> None:
        super().__init__(message)
        self.missing = tuple(missing)  # what would have to be equal
        self.module = module


def slim(model: nn.Module, coupling: Coupling, keep: Mapping[str, Tensor]) -> nn.Module:
    """Return a new, really smaller model of the same class; the given one stays as it is.

    Args:
        model: the model that was combed; masked or not, the removed rows do not count.
        coupling: what combing found.
        keep: `{group name: BoolTensor(units)}`, True = kept.

    Raises:
        ValueError: if the keep does not fit.
        SlimError: if the model's attributes cannot follow, which `comb` finds out and freezes unless `trial=False`.

    Example:
        >>> keep = coupling.keep()
        >>> keep['conv1'][::2] = False
        >>> small = slim(model, coupling, keep)    # computes what the masked model computes
        >>> model.conv1.out_channels, small.conv1.out_channels
        (8, 4)
    """
    coupling.check(keep)
    small = _sliced(model, coupling, dict(keep))
    with discarding(model) as failed:
        failed.append(small)
        _adapt_(model, small, coupling, dict(keep))
        failed.clear()
    return small


def _adapt_(model: nn.Module, small: nn.Module, coupling: Coupling, keep: Keep) -> None:
    """Let modules, scales, sizes and attributes follow the tensors that were cut."""
    before = {path: local_shapes(module) for path, module in model.named_modules()}
    changed = {path for path, module in small.named_modules() if local_shapes(module) != before[path]}
    for path in list(changed):  # a replaced module speaks for its children
        changed.update(p for p in before if path and p and path.startswith(p + '.'))
    replaced = _replace_(small, changed)
    _fold_scales_(small, coupling, keep, replaced)
    _set_sizes_(small, coupling, keep, before, replaced)
    _let_follow_(model, small, coupling, replaced)


@torch.no_grad()
def _sliced(model: nn.Module, coupling: Coupling, keep: Keep) -> nn.Module:
    """Copy a model with the kept rows; what goes is never copied, and shared tensors stay shared."""
    kept = kept_rows(coupling, keep)
    memo: dict[int, Any] = {}
    tensors = {**plain_tensors(model), **named_tensors(model)}
    computed = {buffer_name(each.module) for each in coupling.fixes.computed}
    late = (kept.keys() & computed) - tensors.keys()  # buffers that the copy gets
    for name, dims in kept.items():
        if name in late:
            continue
        tensor = tensors[name]
        value = tensor.detach()
        for dim, rows in sorted(dims.items()):  # whole rows first: they lie together in memory
            value = gathered(value, dim, rows.nonzero().flatten().to(value.device))
        memo[id(tensor)] = as_tensor_of(tensor, value)
    small = copied(model, memo, coupling.caches)
    register_plain_(small, kept)
    give_kept_(small, coupling.fixes.computed)
    for name in late:
        path, _, local = name.rpartition('.')
        module, (live,) = small.get_submodule(path), kept[name].values()
        setattr(module, local, module.get_buffer(local)[live])
    unmask_statistics_(small)
    note_rows_(small, kept)
    return small


def as_tensor_of(tensor: Tensor, value: Tensor) -> Tensor:
    """Return the value as a parameter where the tensor is one, and as a plain tensor elsewhere."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _replace_(model: nn.Module, changed: set[str]) -> dict[str, str]:
    """Replace the modules of `REPLACEMENTS` that hold cut tensors; return their kinds by path."""
    found: dict[str, str] = {}
    replaced: list[Replaced] = []
    for path, module in list(model.named_modules()):
        kind = replacement(module)
        if kind is not None and path in changed:
            new = REPLACEMENTS[kind].kind(module)
            replace_module(model, module, new)
            replaced.append(Replaced(module, new))
            found[path] = kind
    refer_(model, replaced)
    return found


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module at all paths of another one."""
    for parent in list(model.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


@torch.no_grad()
def _fold_scales_(model: nn.Module, coupling: Coupling, keep: Keep, replaced: Mapping[str, str]) -> None:
    """Keep softmax(q k^T / sqrt(d)) what it was where the forward takes the square root of the new width."""
    if not coupling.fixes.scales:
        return
    live, kept, tensors = coupling.live(keep), kept_rows(coupling, keep), named_tensors(model)
    for scale in coupling.fixes.scales:
        width = len(coupling.axes[scale.axis])
        if scale.module in replaced or live[scale.axis] == width:
            continue
        factor = math.sqrt(live[scale.axis] / width)
        for rows in scale.rows:
            size = coupling.tensors[rows.tensor].shape[rows.dim]
            alive = kept.get(rows.tensor, {}).get(rows.dim, torch.ones(size, dtype=torch.bool))
            tensor = tensors[rows.tensor]
            found = torch.isin(alive.nonzero().flatten(), torch.tensor(rows.index))
            place = found.nonzero().flatten().to(tensor.device)
            tensor.index_copy_(rows.dim, place, tensor.index_select(rows.dim, place) * factor)


# -- sizes: what attributes and calls must say -------------------------------------------------------------------------
def _set_sizes_(
    model: nn.Module, coupling: Coupling, keep: Keep, before: Mapping[str, Shapes], replaced: Mapping[str, str]
) -> None:
    """Set the attributes: those that describe from the tensors, those that a forward reads by solving."""
    modules = modules_outside(model, replaced)

    def describe() -> None:
        for path, module in modules.items():
            if local_shapes(module) != before[path]:
                for name, value in described(module, local_shapes(module)).items():
                    setattr(module, name, value)

    describe()
    changes, rewrites = planned_sizes(modules, coupling, coupling.live(keep).tolist())
    for attribute, value in changes.items():
        write_attribute(modules[attribute.module], attribute.name, value)
    describe()  # again: a convolution's channels follow from its groups
    kinds: dict[tuple[type, tuple[Rewrite, ...]], type] = {}  # the blocks of a network are compiled once
    for path, wanted in rewrites.items():
        key = type(modules[path]), tuple(wanted)
        try:
            modules[path].__class__ = kinds[key] = kinds.get(key) or rewritten(*key)
        except SlimError as error:
            error.module = path
            raise


def _let_follow_(model: nn.Module, small: nn.Module, coupling: Coupling, replaced: Iterable[str]) -> None:
    """Set the widths that blocks keep for their other methods, or say where it is not clear which one they are."""
    dense, modules = dict(model.named_modules()), modules_outside(small, replaced)
    layers = {path: Layer.of(dense[path], module) for path, module in modules.items() if local_shapes(module)}
    methods = Methods(dense.values(), coupling.example.forward)
    named = {leaf for rule in coupling.fixes.sizes for leaf in leaves(rule.expression, Attr)}
    unclear: dict[str, str] = {}
    for path, module in modules.items():
        kind, prefix = type(dense[path]), f'{path}.' if path else ''
        below = [each for p, each in layers.items() if f'{p}.'.startswith(prefix)]
        for name, value in () if kind.__module__.startswith('torch.') else integers(dense[path]).items():
            found, base = followed(name, value, below), name.partition('[')[0]
            if Attr(path, name) in named or found <= {value}:
                continue
            if len(found) == 1 and not methods.run_reads(kind, base):
                write_attribute(module, name, found.pop())
            elif (later := methods.later(kind, base)) is not None:
                unclear[prefix + name] = later
    if unclear:
        name, later = next(iter(unclear.items()))
        more = f' and {len(unclear) - 1} more' if len(unclear) > 1 else ''
        text = f'slimming cannot tell which width {name}{more} is, which {later}() reads: call it before combing'
        warnings.warn(text, stacklevel=4)


def modules_outside(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules by path, without those at or below the given paths."""
    below = [f'{path}.' for path in paths]
    return {path: module for path, module in model.named_modules() if not f'{path}.'.startswith(tuple(below))}


def planned_sizes(
    modules: Mapping[str, nn.Module], coupling: Coupling, live: Sequence[int]
) -> tuple[dict[Attr, int], dict[str, list[Rewrite]]]:
    """Work out which attributes change, and which sizes in calls, for the live counts of all axes.

    Rules about modules that are not among these (those that were replaced) are left out.

    Returns:
        New values of attributes; and by module path what is written into its source.

    Raises:
        SizeConflict: an attribute or a line would have to say two widths.
        SlimError: nothing can make a size what it must be.
    """
    fixes = coupling.fixes
    sizes = sorted((rule for rule in fixes.sizes if _within(modules, rule)), key=_rank)
    constants = [rule for rule in fixes.constants if rule.site is not None and _within(modules, rule)]
    pairs = [pair for pair in fixes.equalities if _known(modules, pair.left, pair.right)]
    rules = [*sizes, *constants]
    sides = [side for pair in pairs for side in (pair.left, pair.right)]
    named = {leaf for expr in [*(rule.expression for rule in rules), *sides] for leaf in leaves(expr, Attr)}
    attributes = {
        leaf: read_attribute(modules[leaf.module], leaf.name)
        for leaf in sorted(named, key=attrgetter('module', 'name'))
    }
    equations = [(rule.expression, _target(rule, live)) for rule in sizes]
    compared = [  # an attribute that the forward holds against a width follows that width
        (a, evaluate(b, {}, live))
        for pair in pairs
        for a, b in ((pair.left, pair.right), (pair.right, pair.left))
        if leaves(a, Attr) and not leaves(a, Live) and not leaves(b, Attr)
    ]
    ranks = [*[_ALONE] * len(compared), *map(_rank, sizes)]
    changes, failed = solve([*compared, *equations], attributes, live, ranks)
    new = {**attributes, **changes}
    unsolved = [sizes[n - len(compared)] for n in failed if n >= len(compared)]
    if lost := [rule for rule in unsolved if rule.site is None]:
        asked = f'{show(lost[0].expression)} equal {_target(lost[0], live)}'
        message = f'no attribute makes {asked} in {lost[0].where}'
        missing = [pair for rule in lost for pair in _rivals(rule, sizes, live)]
        raise SizeConflict(message, missing, _module_of(lost[0].expression))
    unsolved += [rule for rule in constants if evaluate(rule.expression, new, live) != rule.target]
    rewrites = _rewrites({rule.site for rule in unsolved if rule.site is not None}, rules, live)
    if apart := [pair for pair in pairs if evaluate(pair.left, new, live) != evaluate(pair.right, new, live)]:
        left, right = show(apart[0].left), show(apart[0].right)
        message = f'the forward compares {left} with {right}, which no longer agree'
        missing = [rival for pair in apart for rival in (pair, *_compared_too(pair, pairs))]
        raise SizeConflict(message, missing, _module_of(apart[0].left, apart[0].right))
    return changes, rewrites


def _rank(rule: SizeRule) -> int:
    """Return how early a size decides attributes: in a call a number can stand, whatever the attribute is."""
    if isinstance(rule.target, int) and isinstance(rule.expression, Attr):
        return _ALWAYS
    return _ALONE if rule.site is None else _WRITTEN


def _module_of(*expressions: Expression) -> str | None:
    """Return the module of the first attribute in some expressions."""
    return next((leaf.module for expr in expressions for leaf in leaves(expr, Attr)), None)


def _known(modules: Mapping[str, nn.Module], *expressions: Expression) -> bool:
    """Say whether all attributes are of modules that are there."""
    return all(leaf.module in modules for expr in expressions for leaf in leaves(expr, Attr))


def _within(modules: Mapping[str, nn.Module], rule: SizeRule) -> bool:
    return _known(modules, rule.expression) and (rule.site is None or rule.site.module in modules)


def _target(rule: SizeRule, live: Sequence[int]) -> int:
    return live[rule.target.axis] if isinstance(rule.target, Live) else rule.target


def _rivals(rule: SizeRule, rules: Sequence[SizeRule], live: Sequence[int]) -> list[Equality]:
    """Return the widths that the same expression or the same call must be as well, where they no longer agree."""
    own = [Equality(rule.target, rule.expression)] if isinstance(rule.expression, Live) else []
    return own + [
        Equality(rule.target, other.target)
        for other in rules
        if isinstance(rule.target, Live)
        and isinstance(other.target, Live)
        and (other.site == rule.site if rule.site is not None else other.expression == rule.expression)
        and live[other.target.axis] != live[rule.target.axis]
    ]


def _compared_too(pair: Equality, pairs: Sequence[Equality]) -> list[Equality]:
    """Return the widths that are held against the same attribute as one of this pair."""
    both = [(each.left, each.right) for each in pairs] + [(each.right, each.left) for each in pairs]
    sides = ((pair.left, pair.right), (pair.right, pair.left))
    return [Equality(width, other) for width, said in sides for other, same in both if said == same and other != width]


def _rewrites(places: set[CallSite], rules: Sequence[SizeRule], live: Sequence[int]) -> dict[str, list[Rewrite]]:
    """Write -1 where a call has none yet, and numbers elsewhere.

    Raises:
        SizeConflict: a line runs twice with widths that differ.
        SlimError: a number would depend on the size of the input.
    """
    at = {place: [rule for rule in rules if rule.site == place] for place in places}
    inferred: dict[tuple[str, str, str], CallSite] = {}
    for place in sorted((p for p in places if p.inferable), key=lambda p: (not _varies(at[p], live), p.index)):
        inferred.setdefault((place.module, place.method, place.text), place)  # a call has one -1
    found: dict[str, list[Rewrite]] = {}
    for place in sorted(places, key=lambda p: (p.module, p.method, p.text, p.index)):
        number = INFER
        if inferred.get((place.module, place.method, place.text)) != place:
            if dependent := [rule.expression for rule in at[place] if leaves(rule.expression, Input)]:
                where = f'{place.text} in {place.method} of {place.module or "the model itself"}'
                text = show(dependent[0])
                error = SlimError(f'{text} depends on the input too, so that no number can stand in its place: {where}')
                error.module = place.module
                raise error
            numbers = {_target(rule, live) for rule in at[place]}
            if len(numbers) > 1:
                where = place.module or 'the model itself'
                message = f'{place.method} of {where} runs {place.text} with different sizes'
                missing = [pair for rule in at[place] for pair in _rivals(rule, at[place], live)]
                raise SizeConflict(message, missing, place.module)
            number = numbers.pop()
        rewrite = Rewrite(place.method, place.text, place.index, place.count, number)
        found.setdefault(place.module, []).append(rewrite)
    return found


def _varies(rules: Sequence[SizeRule], live: Sequence[int]) -> bool:
    """Say whether no one number would do: it runs with several, or one that depends on the input."""
    return len({_target(rule, live) for rule in rules}) > 1 or any(leaves(rule.expression, Input) for rule in rules)
