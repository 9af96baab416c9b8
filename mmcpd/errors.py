"""Errors that a user can act on: each message says what, where and what to do."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 160 characters; its kind where it has none.

    Example:
        >>> first_line(ValueError('not a number')), first_line(KeyError())
        ('not a number', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


class CombError(RuntimeError):
    """The model cannot be combed, or only under looser settings."""


class SlimError(RuntimeError):
    """A keep or a structure does not fit the model that it is applied to.

    Attributes:
        module: the path of the module whose sizes cannot follow, None where it is not known.
    """

    module: str | None = None


class ProofError(SlimError):
    """A slim file does not become, in a model that is built from its config, what was slimmed."""


class NotFiniteError(SlimError):
    """The weights that are to be slimmed are not finite."""


class PruneError(ValueError):
    """Nothing can be pruned, or not as far as the target."""


class TargetError(RuntimeError):
    """A run ended before its target; what it wrote is whole."""


class DeployError(RuntimeError):
    """A model cannot be exported, or the exported one does not compute the same."""


class OpsetError(DeployError):
    """A model has operators that the opset asked for lacks; `needed` is the oldest one that has them all."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed
