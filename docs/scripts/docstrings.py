"""Let the API reference show the examples of docstrings as code: an extension of griffe."""

from __future__ import annotations

import re

import griffe


class Docstrings(griffe.Extension):
    """Write `Example:` as `Examples:`, whose doctests mkdocstrings knows, and `a, b: text` once for each."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            text = re.sub(r'^( *)Example:$', r'\1Examples:', obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(
                r'^( {4,8})(\w+(?:, \w+)+)(:(?: .*\n?)(?:\1 +.*\n?)*)', one_by_one, text, flags=re.M
            )


def one_by_one(found: re.Match[str]) -> str:
    indent, names, text = found.groups()
    return '\n'.join(f'{indent}{name}{text.rstrip()}' for name in names.split(', ')) + '\n' * text.endswith('\n')
