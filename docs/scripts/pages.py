"""Make the pages that only the site has: what is written elsewhere is added to it, so that nothing is written twice."""

from __future__ import annotations

import re
from pathlib import Path

from docs.scripts.messages import message_page
from docs.scripts.options import command_page, config_page

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md', 'changelog.md': 'CHANGELOG.md'}
MADE = {'commands.md': command_page, 'options.md': config_page, 'messages.md': message_page}
# What pages call those that only the site has.
TITLES = {'Commands': 'commands.md', 'Config options': 'options.md', 'All error messages': 'messages.md'}
# The packages of the API reference, and the modules that belong to one and that it does not export.
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


def names() -> list[str]:
    """Return the names of the pages."""
    return [*FROM_ROOT, *MADE, *(f'api/{name}.md' for name in PACKAGES)]


def content(name: str) -> str:
    """Return the Markdown of a page."""
    if name in FROM_ROOT:
        return from_root(ROOT / FROM_ROOT[name])
    if name in MADE:
        return MADE[name]()
    package = Path(name).stem
    modules = (f'mmcpd.{package}', *PACKAGES[package])
    return '\n\n'.join([f'# mmcpd.{package}', *(f'::: {module}' for module in modules)]) + '\n'


def from_root(path: Path) -> str:
    """Return a page that lies beside `docs`, its links turned to where the site has their targets."""
    text = path.read_text('utf-8')
    for page, source in FROM_ROOT.items():
        text = text.replace(f']({source}', f']({page}')
    return text.replace('](docs/', '](')


def in_site(markdown: str) -> str:
    """Turn links that lead out of `docs` into the site's or into text, and titles of its own pages into links."""
    markdown = re.sub(r'\]\(\.\./(CONTRIBUTING|CHANGELOG)\.md', lambda found: f']({found[1].lower()}.md', markdown)
    for title, target in TITLES.items():
        markdown = markdown.replace(f'*{title}*', f'[{title}]({target})')
    return re.sub(r'\[([^\]]*)\]\(\.\./[^)]*\)', r'\1', markdown)
