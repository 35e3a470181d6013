"""A hook of mkdocs: an entry of the nav that ends in ``/`` becomes the pages of that folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Lists the folders, so that a page that is added there needs no entry of its own."""
    docs = Path(config.docs_dir)
    for entry in config.nav:
        for title, target in entry.items():
            if isinstance(target, str) and target.endswith("/"):
                pages = sorted((docs / target).glob("*.md"))
                entry[title] = [page.relative_to(docs).as_posix() for page in pages]
    return config
