"""Let modules whose source was rewritten be copied and pickled: as their class and the numbers put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

from torch import nn
from torch.fx import GraphModule

from ..errors import SlimError

Rewriting: TypeAlias = Callable[[nn.Module, Sequence[Any]], None]


def copy_methods(rewrite_: Rewriting, kind: type) -> dict[str, Callable[..., Any]]:
    """Return the methods by which instances of a class that `rewrite_` makes of `kind` are pickled and copied.

    Another process imports `kind` and this package; what it lacks it names in one line. A `GraphModule` compiles its
    graph into its class, which would take the sizes away again: its graph cannot be changed any more.
    """

    def __reduce_ex__(module: nn.Module, protocol: int) -> tuple[Any, ...]:
        rewrites: Any = vars(type(module))['rewrites']
        with _as(kind, module):
            reduced: Any = module.__reduce_ex__(protocol)
        build, arguments, *rest = reduced
        return _rebuilt, (rewrite_, rewrites, build, arguments), *rest

    def __deepcopy__(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        rewrites: Any = vars(type(module))['rewrites']
        with _as(kind, module):
            twin: nn.Module = kind.__deepcopy__(module, memo)  # type: ignore[attr-defined]
        rewrite_(twin, rewrites)
        return twin

    found: dict[str, Callable[..., Any]] = {'__reduce_ex__': __reduce_ex__}
    if hasattr(kind, '__deepcopy__'):
        found['__deepcopy__'] = __deepcopy__
    if issubclass(kind, GraphModule):
        found['recompile'] = _refuse
    return found


@contextmanager
def _as(kind: type, module: nn.Module) -> Iterator[None]:
    made = type(module)
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = made


def _refuse(module: GraphModule) -> NoReturn:
    raise SlimError('sizes were put into the source of this GraphModule: trace it anew, and change the graph of that')


def _rebuilt(
    rewrite_: Rewriting, rewrites: Sequence[Any], build: Callable[..., nn.Module], arguments: tuple[Any, ...]
) -> nn.Module:
    module = build(*arguments)
    rewrite_(module, rewrites)
    return module
