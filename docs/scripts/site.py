"""Add to the site what is written elsewhere: README, CONTRIBUTING, CHANGELOG, options, messages, API reference.

A hook of mkdocs. These pages exist in the built site alone, so that nothing is written twice.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs' / 'scripts')]

from messages import message_page  # noqa: E402
from options import command_page, config_page  # noqa: E402

FROM_ROOT = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md', 'changelog.md': 'CHANGELOG.md'}
# What pages call those that only the site has.
TITLES = {'Commands': 'commands.md', 'Config options': 'options.md', 'All error messages': 'messages.md'}
# A package, and what of it makes a page: all of `__all__`, or these modules too.
PACKAGES = {
    'comb': ('mmcpd.coupling', 'mmcpd.cost'),
    'slim': ('mmcpd.slim.compare',),
    'prune': (),
    'rotate': (),
    'refit': (),
    'distill': (),
    'engine': (),
    'deploy': (),
    'errors': (),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {
        'commands.md': command_page(),
        'options.md': config_page(),
        'messages.md': message_page(),
        **{name: from_root(ROOT / source) for name, source in FROM_ROOT.items()},
        **{f'api/{name}.md': api_page(name, more) for name, more in PACKAGES.items()},
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to CONTRIBUTING and CHANGELOG into the site, and those to other files of the repository into text."""
    markdown = re.sub(r'\]\(\.\./(CONTRIBUTING|CHANGELOG)\.md', lambda found: f']({found[1].lower()}.md', markdown)
    for title, target in TITLES.items():
        markdown = markdown.replace(f'*{title}*', f'[{title}]({target})')
    return re.sub(r'\[([^\]]*)\]\(\.\./[^)]*\)', r'\1', markdown)


def from_root(path: Path) -> str:
    """Return a page that lies beside `docs`, its links turned to where the site has their targets."""
    text = path.read_text('utf-8')
    for page, source in FROM_ROOT.items():
        text = text.replace(f']({source}', f']({page}')
    return text.replace('](docs/', '](')


def api_page(name: str, more: tuple[str, ...]) -> str:
    """Return the reference of one package: what it offers, from docstrings."""
    heading = f'# mmcpd.{name}'
    return '\n\n'.join([heading, *(f'::: {module}' for module in (f'mmcpd.{name}', *more))]) + '\n'
