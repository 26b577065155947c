"""How long the tests of an earlier version take then and now, from the JUnit files of both.

    python -m pytest -q -m "not slow" --junitxml FILE        # in each checkout, one after the other, nothing else running
    python benchmarks/suite_times.py BEFORE.xml NOW.xml

Functions are compared by name, since files have moved. A function counts with all its cases, set-up and tear-down included, those
that have been added too; functions that only one side has are counted apart. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from common import machine


def seconds(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Test function → seconds of all its cases; → number of cases that ran and passed."""
    taken, passed = Counter[str](), Counter[str]()
    for case in ElementTree.parse(path).iter("testcase"):
        name = str(case.get("name")).partition("[")[0]
        taken[name] += float(case.get("time") or 0)
        passed[name] += not any(case.find(what) is not None for what in ("failure", "error", "skipped"))
    return taken, passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("now", type=Path)
    args = parser.parse_args()
    (before, passed_before), (now, passed_now) = seconds(args.before), seconds(args.now)
    both = [name for name in before if name in now]
    sums = {side: sum(taken[name] for name in both) for side, taken in (("before", before), ("now", now))}
    text = {
        "benchmark": "suite_times",
        "ratio": round(sums["now"] / sums["before"], 3),
        "seconds": {side: round(value) for side, value in sums.items()},
        "whole": {"before": round(sum(before.values())), "now": round(sum(now.values()))},
        "functions": {"before": len(before), "both": len(both), "now": len(now)},
        "cases passed": {
            side: sum(found[name] for name in both) for side, found in (("before", passed_before), ("now", passed_now))
        },
        "gone": sorted(set(before) - set(now)),
        "settings": {},
        "machine": machine(),
    }
    print(json.dumps(text))


if __name__ == "__main__":
    main()
