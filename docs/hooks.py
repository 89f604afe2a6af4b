"""Adapts the pages for mkdocs: the README becomes the home page, links out of docs/ become paths."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the README as the home page."""
    readme = re.sub(r'\]\((?!docs/|#|\w+://)', '](../', (ROOT / 'README.md').read_text())
    files.append(File.generated(config, 'index.md', content=readme.replace('](docs/', '](')))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replaces links to files outside docs/, which are not part of the site, by the paths of the files."""
    outside = re.escape('../' * (page.file.src_uri.count('/') + 1))
    return re.sub(rf'\[[^\]]+\]\({outside}([^)]+)\)', r'`\1`', markdown)
