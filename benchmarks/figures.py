"""Every measured figure of README and docs, from the records in benchmarks/results.

    python benchmarks/figures.py            # write the marked blocks of all pages anew
    python benchmarks/figures.py --check    # name the blocks that differ from the records, and exit with 1

A page holds `<!-- figures: NAME -->`, the figures, and `<!-- end -->`. NAME is in a table FIGURES of
`figure_blocks/`, with a function that reads records and returns Markdown.
"""

from __future__ import annotations

import argparse
import re
import sys

from figure_blocks import computing, loading, runs, speed, trials
from figure_blocks.records import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
FIGURES = {**runs.FIGURES, **trials.FIGURES, **loading.FIGURES, **computing.FIGURES, **speed.FIGURES}


def renewed(text: str) -> str:
    """A page with its blocks as the records have them."""
    return BLOCK.sub(lambda m: f"<!-- figures: {m[1]} -->\n{FIGURES[m[1]]()}<!-- end -->", text)


def differing(text: str) -> list[str]:
    """Names of a page's blocks that are not as the records have them."""
    return [name for name, body in BLOCK.findall(text) if body != FIGURES[name]()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; name the blocks that differ")
    check = parser.parse_args().check
    found = [(page, name) for page in PAGES for name in differing(page.read_text())]
    for page, name in found:
        print(f"{page.relative_to(ROOT)}: {name} {'differs from its record' if check else 'renewed'}")
        if not check:
            page.write_text(renewed(page.read_text()))
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
