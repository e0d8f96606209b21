"""Configure the docs site, which `make docs` builds. Pages are plain Markdown without directives, because GitHub also shows them."""

from __future__ import annotations

import re
from typing import Any

from torchgraft.version import __version__

project = "torchgraft"
author = "the torchgraft authors"
project_copyright = author
release = version = __version__

extensions = ["myst_parser"]
exclude_patterns = ["_build", "examples"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"torchgraft {release}"
highlight_language = "none"  # formulas are indented text

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(((?!https?:|\.\.)[^)#]+)\.md\)")


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """Add the navigation to an index page: its links, grouped by its headings."""
    if page != "index" and not page.endswith("/index"):
        return
    captions = ["", *HEADING.findall(source[0])]
    for caption, section in zip(captions, HEADING.split(source[0])[::2], strict=True):
        pages = [f"{text} <{page}>" for text, page in dict.fromkeys(LINK.findall(section))]
        if pages:
            source[0] += "\n```{toctree}\n:hidden:\n" + f":caption: {caption}\n" * bool(caption) + "\n" + "\n".join(pages) + "\n```\n"
