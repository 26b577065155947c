"""What each hostile archive of the tests costs: the peak memory of a build that refuses it, over what the process took before.

    python benchmarks/hostile.py

Prints one JSON line for each; `ratio` is the bound (64 MB) over the peak, so more than 1 keeps it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import line

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))
from tars import HOSTILE, measured

BOUND = 64.0


def main() -> None:
    for name, (make, _) in HOSTILE.items():
        with tempfile.TemporaryDirectory() as folder:
            said, megabytes = measured(make, Path(folder))
        peak = np.array([max(megabytes, 0.001)])
        text = line(f"hostile/{name}", 1 / peak, {"bound": np.array([1 / BOUND])}, "1/MB", {})
        print(json.dumps({**text, "megabytes": round(megabytes, 2), "said": said.replace(folder, "")}))


if __name__ == "__main__":
    main()
