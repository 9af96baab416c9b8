"""Gather the messages of the errors that mmcpd raises, with `...` in place of values, from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / 'mmcpd'
GAP = '...'  # stands for a value
INTERNAL = {'AssertionError', 'AttributeError', 'KeyboardInterrupt', 'NotImplementedError'}


@dataclass(frozen=True)
class Message:
    """One message: the file that raises it, the error's class, and its text."""

    file: str
    error: str
    text: str


def messages() -> list[Message]:
    """Return the messages of all errors that are raised with a text, by file and in the order of its lines."""
    found = []
    for path in sorted(PACKAGE.rglob('*.py')):
        file = path.relative_to(PACKAGE).as_posix()
        if not file.startswith('.mim'):
            found += [Message(file, error, text) for error, text in _raised(ast.parse(path.read_text('utf-8')))]
    return found


def message_page() -> str:
    """Return the page of all messages, by the part of mmcpd that raises them."""
    parts = [
        '# All error messages',
        'Read from the source; `...` stands for a value. Each message says what to do; '
        '[Troubleshooting](troubleshooting.md) says more of the frequent ones.',
    ]
    by_part: dict[str, list[Message]] = {}
    for message in messages():
        by_part.setdefault(message.file.split('/')[0].removesuffix('.py'), []).append(message)
    for part, found in by_part.items():
        parts.append(f'## {part}')
        parts.append('\n'.join(f'- `{message.text}` ({message.error})' for message in found))
    return '\n\n'.join(parts) + '\n'


def template(node: ast.expr) -> str:
    """Return what an expression of text says, with `...` for all that is not written out.

    Example:
        >>> template(ast.parse("f'{path} is ' + 'damaged'").body[0].value)
        '... is damaged'
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(value.value if isinstance(value, ast.Constant) else GAP for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return GAP


def texts() -> str:
    """Return every text in mmcpd's source, one a line: where a message is put together elsewhere, it is found here."""
    found = []
    for path in sorted(PACKAGE.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append(' '.join(template(node).split()))
    return '\n'.join(found)


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    for call in sorted(raised, key=lambda call: call.lineno):
        error = ast.unparse(call.func)
        text = ' '.join(template(call.args[0]).split()).replace('`', "'") if call.args else ''
        if error[:1].isupper() and error not in INTERNAL and text.strip(' .'):
            yield error, text
