"""A hook of mkdocs: add the pages of `pages.py`, and turn links into those of the site."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from docs.scripts import pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name in pages.names():
        files.append(File.generated(config, name, content=pages.content(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links."""
    return pages.in_site(markdown)
