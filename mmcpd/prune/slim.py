"""Slimming: cut the removed rows out of every tensor, and let the modules' attributes follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..comb.errors import SlimError
from ..comb.expressions import evaluate, leaves, read_attribute, show, solve, write_attribute
from ..comb.groups import Comb, Keep
from .attributes import Shapes, described, local_shapes
from .masks import live_rows, named_tensors, unmask_norms_
from .replace import REPLACEMENTS, replacement
from .rewrite import Rewrite, rewrite_, rewrites_of


def slim(model: nn.Module, comb: Comb, keep: Mapping[str, Tensor]) -> nn.Module:
    """Return a new, really smaller model of the same class; the given one stays as it is.

    Args:
        model: the model that was combed; masked or not, the removed rows do not count.
        comb: what combing found.
        keep: `{group name: BoolTensor(units)}`, True = stays.

    Raises:
        ValueError: if the keep does not fit.
        SlimError: if the model's attributes cannot follow, which `comb` finds out and freezes unless `trial=False`.

    Example:
        >>> small = slim(model, c, keep)
        >>> small(x)                    # equals the masked model's output
    """
    comb.check(keep)
    small = _cut(model, comb, dict(keep))
    before = {path: local_shapes(module) for path, module in model.named_modules()}
    changed = {path for path, module in small.named_modules() if local_shapes(module) != before[path]}
    for path in list(changed):  # a replaced module speaks for its children
        changed.update(p for p in before if path and p and path.startswith(p + '.'))
    replaced = _replace_(small, changed)
    _fold_scales_(small, comb, dict(keep), replaced)
    _follow_(small, comb, dict(keep), before, replaced)
    return small


@torch.no_grad()
def _cut(model: nn.Module, comb: Comb, keep: Keep) -> nn.Module:
    """Copy a model with the rows that stay; what goes is never copied, and shared tensors stay shared."""
    live = live_rows(comb, keep)
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        if name not in live:
            continue
        value = tensor.detach()
        for dim, rows in live[name].items():
            value = value.index_select(dim, rows.nonzero().flatten().to(value.device))
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    small = copy.deepcopy(model, memo)
    unmask_norms_(small)
    return small


def _replace_(model: nn.Module, changed: set[str]) -> dict[str, str]:
    """Replace the modules of `REPLACEMENTS` that hold cut tensors; return their kinds by path."""
    found: dict[str, str] = {}
    for path, module in list(model.named_modules()):
        kind = replacement(module)
        if kind is not None and path in changed:
            set_module(model, path, REPLACEMENTS[kind].build(module))
            found[path] = kind
    return found


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)


@torch.no_grad()
def _fold_scales_(model: nn.Module, comb: Comb, keep: Keep, replaced: Mapping[str, str]) -> None:
    """Keep softmax(q k^T / sqrt(d)) what it was where the forward takes the square root of the new width."""
    if not comb.scales:
        return
    live, stay, tensors = comb.live(keep), live_rows(comb, keep), named_tensors(model)
    for pieces, axis, path in comb.scales:
        if path in replaced or live[axis] == len(comb.axes[axis]):
            continue
        factor = math.sqrt(live[axis] / len(comb.axes[axis]))
        for name, dim, rows in pieces:
            alive = stay.get(name, {}).get(dim, torch.ones(comb.shapes[name][dim], dtype=torch.bool))
            place = torch.isin(alive.nonzero().flatten(), torch.tensor(rows)).nonzero().flatten()
            tensor = tensors[name]
            tensor.index_copy_(dim, place, tensor.index_select(dim, place) * factor)


def _follow_(
    model: nn.Module, comb: Comb, keep: Keep, before: Mapping[str, Shapes], replaced: Mapping[str, str]
) -> None:
    """Set the attributes: those that describe from the tensors, those that a forward reads by solving."""
    modules = dict(model.named_modules())
    outside = {path: not any(path == r or path.startswith(r + '.') for r in replaced) for path in before}
    live = comb.live(keep).tolist()

    def describe() -> None:
        for path, shapes in before.items():
            if outside[path] and path in modules and local_shapes(modules[path]) != shapes:
                for name, value in described(modules[path], local_shapes(modules[path])).items():
                    setattr(modules[path], name, value)

    describe()

    def inside(*expressions: Any) -> bool:
        """Say whether all attributes are of modules that were not replaced."""
        return all(outside.get(path, False) for e in expressions for _, path, _ in leaves(e, 'attr'))

    rules = [r for r in comb.sizes if inside(r.expression) and outside.get(r.site.module if r.site else '', True)]
    pairs = [pair for pair in comb.equal if inside(*pair)]
    names = {
        leaf[1:] for e in [r.expression for r in rules] + [e for p in pairs for e in p] for leaf in leaves(e, 'attr')
    }
    attributes = {(path, name): read_attribute(modules[path], name) for path, name in sorted(names)}
    equations = [(r.expression, r.target if r.constant else live[r.target]) for r in rules]
    compared = [  # an attribute that the forward holds against a width follows that width
        (a, evaluate(b, {}, live))
        for pair in pairs
        for a, b in (pair, pair[::-1])
        if leaves(a, 'attr') and not leaves(a, 'live') and not leaves(b, 'attr')
    ]
    changes, failed = solve([*equations, *compared], attributes, live)
    for (path, name), value in changes.items():
        write_attribute(modules[path], name, value)
    describe()  # again: a convolution's channels follow from its groups
    rewrites: dict[str, list[Rewrite]] = {}
    for number in (n for n in failed if n < len(rules)):
        expr, value = equations[number]
        if rules[number].site is None:
            raise SlimError(f'no attribute makes {show(expr)} equal {value}')
    wanted = [(rule.site, value) for rule, (_, value) in zip(rules, equations, strict=True)]
    places = {rules[n].site for n in failed if n < len(rules)}
    numbers = [r for r in comb.numbers if inside(r.expression) and r.site and outside.get(r.site.module, False)]
    for rule in numbers:
        present = {leaf[1:]: read_attribute(modules[leaf[1]], leaf[2]) for leaf in leaves(rule.expression, 'attr')}
        if evaluate(rule.expression, present, live) != rule.target:
            places.add(rule.site)
    wanted += [(rule.site, rule.target) for rule in numbers]
    for rule in [*rules, *numbers]:
        if rule.site in places and leaves(rule.expression, 'input'):
            raise SlimError(f'{show(rule.expression)} hangs on the input too, so that no number can stand in its place')
    for place, value in wanted:  # of a line that runs twice both, so that they are seen to differ
        if place is not None and place in places:
            rewrites.setdefault(place.module, []).append((place.method, place.call, place.index, place.count, value))
    for path, changed in rewrites.items():
        rewrite_(modules[path], changed)
    attributes.update(changes)
    for left, right in pairs:
        if evaluate(left, attributes, live) != evaluate(right, attributes, live):
            raise SlimError(f'the forward compares {show(left)} with {show(right)}, which no longer agree')


# -- structure: what a slimmed model is, without its values ----------------------------------------------------------
def structure(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Describe how a slimmed model differs from its dense one, in plain JSON types.

    Returns:
        `tensors` (new shapes by name), `attributes` (new values by module path and name), `replaced` (kinds by module
        path, with the arguments of the replacement) and `rewritten` (sizes put into methods, by module path).

    Example:
        >>> plan = structure(model, small)
        >>> twin = restructure_(build_dense(), json.loads(json.dumps(plan)))
        >>> twin.load_state_dict(small.state_dict())
    """
    new = dict(small.named_modules())
    replaced: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    rewritten: dict[str, Any] = {}
    for path, module in model.named_modules():
        other = new.get(path)
        if other is None or any(path.startswith(r + '.') for r in replaced):
            continue
        kind = next((k for k, r in REPLACEMENTS.items() if type(other) is r.kind and type(module) is not r.kind), None)
        if kind is not None:
            replaced[path] = {'kind': kind, 'arguments': other.arguments()}
            continue
        changes = {
            n: list(v) if isinstance(v, tuple) else v
            for n, v in vars(other).items()
            if _plain(v) and _plain(vars(module).get(n)) and v != vars(module)[n] and n != 'training'
        }
        if changes:
            attributes[path] = changes
        if rewrites_of(other):
            rewritten[path] = [list(r) for r in rewrites_of(other)]
    old = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    tensors = {n: list(t.shape) for n, t in small.state_dict(keep_vars=True).items() if old.get(n) != tuple(t.shape)}
    return {'tensors': tensors, 'attributes': attributes, 'replaced': replaced, 'rewritten': rewritten}


def _plain(value: Any) -> bool:
    return type(value) is int or (type(value) in (tuple, list) and all(type(v) is int for v in value))


@torch.no_grad()
def restructure_(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built dense model the structure of a slimmed one; its values are then arbitrary.

    Raises:
        SlimError: if the plan names what the model has not, so that it is another model's.
    """
    shared: dict[int, Tensor] = {}
    for name, shape in plan['tensors'].items():
        path, _, local = name.rpartition('.')
        module = _find(model, path)
        own = module._parameters if local in module._parameters else module._buffers
        tensor = own.get(local)
        if tensor is None or tensor.dim() != len(shape) or any(s > o for s, o in zip(shape, tensor.shape, strict=True)):
            have = 'missing' if tensor is None else tuple(tensor.shape)
            raise SlimError(f'{name} is {have} in this model, and {tuple(shape)} in the structure: another model')
        if id(tensor) not in shared:
            value = tensor.detach()[tuple(slice(0, s) for s in shape)].clone()
            shared[id(tensor)] = (
                nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            )
        own[local] = shared[id(tensor)]  # type: ignore[assignment]
    for path, entry in plan['replaced'].items():
        module = _find(model, path)
        set_module(model, path, REPLACEMENTS[entry['kind']].build(module, **entry['arguments']))
    for path, values in plan['attributes'].items():
        module = _find(model, path)
        for name, value in values.items():
            if not hasattr(module, name):
                raise SlimError(
                    f'{path or "the model"} has no attribute {name}, which the structure sets: another model'
                )
            setattr(module, name, type(getattr(module, name))(value))
    for path, rewrites in plan.get('rewritten', {}).items():
        rewrite_(_find(model, path), [(m, call, index, count, int(value)) for m, call, index, count, value in rewrites])
    return model


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SlimError(f'this model has no module {path!r}, which the structure names: another model') from error
