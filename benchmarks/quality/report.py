"""Writes docs/results.md from the JSON files in benchmarks/results/quality.

Usage: python -m benchmarks.quality.report

An experiment ``<name>`` is a module ``benchmarks/quality/<name>.py`` that writes ``<name>.json``
(:func:`benchmarks.quality.results.save_result`) and has ``render(result)``, which returns its
section of the page: Markdown that begins with ``## ``. There is no list to add it to.
"""

from __future__ import annotations

import importlib
import json

from benchmarks.quality.results import RESULTS, ROOT
from plum.files import write_text

PAGE = ROOT / "docs" / "results.md"
_HEAD = """# Results

Every figure on this page stands in a JSON file in `benchmarks/results/quality`, which the command
under its title wrote; `python -m benchmarks.quality.report` makes the page from them. Published
figures stand beside ours where there are any, and each section says what was measured and where
the two are not the same thing.

In all tables:

- *R@10* is Recall@10 and *N@10* NDCG@10, on the test items.
- *Unseen*: the items of the user's history are left out of the ranking. Without the word they may
  be recommended again.
- Figures by level begin with level 0, the coarsest; *by length* with prefixes of one code. *First
  level* is the number of codes at level 0.
- *Unique* is the number of distinct SIDs over that of items.
- `versions` says which Python, torch and plum wrote a run, or, where a file has it once, one of its
  runs. No file names a commit; where a row is of older code, its section says so.
"""


def page() -> str:
    """Returns the whole page, experiments in the order of their names."""
    sections = [_HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        experiment = importlib.import_module(f"benchmarks.quality.{path.stem}")
        sections.append(experiment.render(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(section.strip("\n") + "\n" for section in sections)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(PAGE)
