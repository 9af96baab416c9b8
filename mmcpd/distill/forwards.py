"""See what modules take and give while a model runs, also where `module.forward` is called and no hook would run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module's forward, before it runs (`output` is None then) or after."""

    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None


@contextmanager
def watching(
    modules: Mapping[str, nn.Module],
    after: Callable[[Call], None],
    before: Callable[[Call], None] | None = None,
) -> Iterator[None]:
    """Hand each call of the named modules' forward to `before` and `after`.

    Hooks would not see a head of mmseg: its `loss` calls `self.forward(x)`.

    Example:
        >>> seen = []
        >>> with watching({'fc': model.fc}, lambda call: seen.append(tuple(call.output.shape))):
        ...     _ = model(images)
        >>> seen
        [(2, 2)]
    """
    own = {name: module.__dict__.get('forward') for name, module in modules.items()}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(Call(name, args, kwargs))
            output = forward(*args, **kwargs)
            after(Call(name, args, kwargs, output))
            return output

        return watched

    try:
        for name, module in modules.items():
            module.__dict__['forward'] = watch(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if own[name] is None:
                module.__dict__.pop('forward', None)
            else:
                module.__dict__['forward'] = own[name]
