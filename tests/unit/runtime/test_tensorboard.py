"""TensorBoard as a user sees it, in a real browser: every page that README names shows what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, answers, browser, needed
from conftest import Finished
from ranks import free_port

from gdd_dist.runtime.tensorboard_layout import LAYOUT

pytestmark = [pytest.mark.browser, pytest.mark.slow, needed]

ROOT = Path(__file__).parents[3]
CHARTS = [title for charts in LAYOUT.values() for title in charts]
COLOURED, FILLED, DARK = "coloured", "filled", "dark"


@pytest.fixture(scope="module")
def board(reported: Finished) -> Iterator[str]:
    """Its address; as `make tensorboard` starts it, on a port of its own."""
    port = free_port()
    told = subprocess.run(["make", "--dry-run", "tensorboard"], cwd=ROOT, capture_output=True, text=True, check=True)
    options = next(line for line in told.stdout.splitlines() if "tensorboard --logdir runs" in line).split()[1:]
    assert options[-2:] == ["--host", "127.0.0.1"], "it can be reached from elsewhere"
    options = [str(reported.out) if word == "runs" else word for word in options] + ["--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        answers(url)
        while len(json.load(urllib.request.urlopen(f"{url}/data/runs"))) < 7:  # it reads in the background
            assert process.poll() is None
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def share(picture: np.ndarray, kind: str) -> float:
    """Percent of the page beside its menus that is coloured (curves), coloured or grey (histograms) or dark (words, pictures).

    TensorBoard chooses the colours of runs, and one of them is grey.
    """
    inside = picture[80:, 400:].astype(int)
    high, low = inside.max(2), inside.min(2)
    coloured, grey = high - low > 60, (high > 100) & (high < 210)
    return 100.0 * float({COLOURED: coloured, FILLED: coloured | grey, DARK: high < 100}[kind].mean())


@pytest.mark.parametrize(
    ("page", "words", "kind", "least"),
    [
        ("custom_scalars", [*LAYOUT, *CHARTS], COLOURED, 0.5),
        ("images", ["gan/samples", "gaussian/samples"], DARK, 3.0),  # it opens the first two of its groups
        # 0.8 without any of the three charts, 1.5 without those of matching.
        ("histograms", ["logits/teacher_logits", "teacher_answers/generated", "teacher_answers/real"], FILLED, 2.0),
        ("hparams", ["gan.batch", "report/result/matched", "report/result/real"], DARK, 0.1),
    ],
)
def test_each_page_shows_what_it_should_and_asks_no_other_host(
    board: str, window: Browser, page: str, words: list[str], kind: str, least: float
) -> None:
    window.open(f"{board}/#{page}", 1600, 1300)
    end, missing, seen = time.monotonic() + 90, words, 0.0
    while (missing or seen < least) and time.monotonic() < end:
        time.sleep(0.5)
        text, seen = window.text(), share(window.picture(), kind)
        missing = [word for word in words if word not in text]
    assert not missing, text
    assert seen >= least, "the page is blank"
    assert not re.search(r"No (dashboards|data|scalar data|image data|histogram data)|Matches \(0\)", text)
    assert not window.strangers()
