"""Write the tables of options from what takes them: argument parsers of the commands, and signatures of classes."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from unittest import mock

from mmcpd.__main__ import COMMANDS

# What a config names, in the order of the page: a heading, and the registry or table that holds the names.
REGISTERED = (
    ('Hooks', 'mmcpd.registry', 'HOOKS'),
    ('Importances', 'mmcpd.prune', 'IMPORTANCES'),
    ('Distillation losses', 'mmcpd.engine.loss_configs', 'LOSSES'),
    ('Models', 'mmcpd.registry', 'MODELS'),
    ('Data sets', 'mmcpd.registry', 'DATASETS'),
)
NOT_OPTIONS = {'self', 'groups'}  # mmcpd gives these itself
SECTION = re.compile(r'^(Args|Raises|Returns|Source|Example|Note):', re.M)


class _Made(Exception):
    """Carry a parser out of the command that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser that `mmcpd NAME` reads its arguments with."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        raise _Made(parser)

    command = import_module(f'mmcpd.cli.{name.replace("-", "_")}')
    with mock.patch.object(argparse.ArgumentParser, 'parse_args', stop):
        try:
            import_module('mmcpd.cli.common').run(command, [])
        except _Made as made:
            return made.parser
    raise AssertionError('a command reads its arguments')


def command_page() -> str:
    """Return the page of all commands: what each does, an example, its arguments and options."""
    parts = ['# Commands', 'Read from the argument parsers; `mmcpd COMMAND --help` shows the same.']
    for name in COMMANDS:
        parser = command_parser(name)
        text, _, example = (parser.description or '').partition('Example:')
        parts += [f'## mmcpd {name}', _plain(text)]
        if example:
            parts.append('```\n' + inspect.cleandoc(example) + '\n```')
        parts.append(_table(('option', 'default', 'meaning'), _command_rows(parser)))
    return '\n\n'.join(parts) + '\n'


def config_page() -> str:
    """Return the page of all that a config names: hooks, importances, losses, models, data sets and their options."""
    parts = ['# Config options', 'Read from signatures and docstrings. `type=` takes the name in the heading.']
    shown = set()
    for heading, module, table in REGISTERED:
        found = getattr(import_module(module), table)
        entries = getattr(found, 'module_dict', found)
        parts.append(f'## {heading}')
        for name in sorted(entries):
            kind = entries[name]
            if kind in shown or not kind.__module__.startswith('mmcpd.'):
                continue
            shown.add(kind)
            parts += [f'### {name}', _plain(SECTION.split(inspect.getdoc(kind) or '')[0])]
            if rows := list(class_rows(kind)):
                parts.append(_table(('option', 'default', 'meaning'), rows))
    return '\n\n'.join(parts) + '\n'


def class_rows(kind: type | Callable[..., object]) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and meaning of each option of a class or function."""
    texts: dict[str, str] = {}
    for base in reversed(getattr(kind, '__mro__', (kind,))):
        texts |= arguments(base.__doc__ or '')
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in NOT_OPTIONS or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        empty = parameter.default is parameter.empty
        elsewhere = next((f'see `{other}`' for other, text in texts.items() if f'`{name}`' in text), '')
        yield f'`{name}`', 'required' if empty else f'`{parameter.default!r}`', texts.get(name, elsewhere)


def arguments(docstring: str) -> dict[str, str]:
    """Return the text of each argument in a docstring's `Args:`; `a, b: text` is the text of both."""
    _, found, section = inspect.cleandoc(docstring).partition('Args:\n')
    lines = [] if not found else re.split(r'^\S', section, maxsplit=1, flags=re.M)[0].splitlines()
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in filter(str.strip, lines):
        if start := re.match(r' {4}([\w, *]+?)(?: \([^()]*\))?: ?(.*)', line):
            names = [name.strip(' *') for name in start[1].split(',')]
            texts |= dict.fromkeys(names, start[2])
        else:
            texts |= {name: f'{texts[name]} {line.strip()}' for name in names}
    return texts


def _command_rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = ', '.join(f'`{name}`' for name in action.option_strings or [action.dest.upper()])
        values = '' if action.nargs == 0 or not action.option_strings else f' `{_value(action)}`'
        fixed = action.default in (None, False, argparse.SUPPRESS)
        help_text = (action.help or '') % {**vars(action), 'prog': parser.prog}
        yield names + values, '' if fixed else f'`{action.default}`', help_text


def _value(action: argparse.Action) -> str:
    choices = '{' + ','.join(map(str, action.choices)) + '}' if action.choices else None
    value = action.metavar or choices or action.dest.upper()
    return ' '.join(value) if isinstance(value, tuple) else value


def _plain(text: str) -> str:
    """Return a docstring's paragraphs as Markdown."""
    return _without_tags(inspect.cleandoc(text).strip())


def _without_tags(text: str) -> str:
    """Let `<config>` be text where it is not in a code span, and no tag of HTML."""
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(part if part.startswith('`') else part.replace('<', '&lt;') for part in parts)


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(
        '| ' + ' | '.join(_without_tags(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines
    )
