"""Every measured figure of README and docs stands in a record, and is written from it."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402
from figure_blocks import records, runs  # noqa: E402

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in figures.PAGES}
CODE = re.compile(r"^```.*?^```|`[^`]*`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"<!-- (?:printed by|arithmetic): .*?<!-- end -->", re.DOTALL)
MEASURED = re.compile(r"\d*\.\d+|±|\d[\d,]* ?(?:s|min|minutes|hours|images/s|steps/s|MB|GB|×|times|%)(?![\w])")
ALLOWED = {  # versions, settings and bounds, in the words that stand around them
    "README.md": ["Python 3.11", "Apache-2.0"],
    "benchmarks/README.md": ["torch ≥ 2.11"],
    "docs/running.md": ["`val` is 5 % of `train`", "at most 3 % of the time"],
    "docs/data.md": ["5 % unless told", "7 times a power of two", "default 50GB"],
    "docs/engines.md": ["(2 GB) per network", "clips gradients at 1.0"],
    "docs/faults.md": [
        "torch 2.14",
        "at most 3 %",
        "have 15 s",
        "within 15 s",
        "those 15 s",
        "25 s at most",
        "more than 30 s",
        "every 5 s",
    ],
    "docs/search.md": ["at least 0.91 means at most 10 %", "127.0.0.1"],
}
ELSEWHERE = {"docs/settings.md", "docs/architecture.md"}  # the first is written from the code


def loose(name: str, text: str) -> list[str]:
    """Measured figures of a page that stand in no block."""
    text = PRINTED.sub("", figures.BLOCK.sub("", text))
    for words in ALLOWED.get(name, []):
        text = text.replace(words, "")
    return MEASURED.findall(CODE.sub("", text))


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_what_the_records_say(name: str) -> None:
    """`python benchmarks/figures.py` writes them anew."""
    assert figures.differing(PAGES[name]) == []
    assert len(re.findall("^<!-- figures: ", PAGES[name], re.MULTILINE)) == len(figures.BLOCK.findall(PAGES[name]))


@pytest.mark.parametrize("name", sorted(set(PAGES) - ELSEWHERE))
def test_no_figure_stands_outside_a_block(name: str) -> None:
    assert loose(name, PAGES[name]) == []


def test_a_changed_digit_is_found() -> None:
    text = PAGES["README.md"]
    (block,) = (body for name, body in figures.BLOCK.findall(text) if name == "digits")
    for number in re.findall(r"\d+\.\d", block):
        changed = number[:-1] + str((int(number[-1]) + 1) % 10)
        assert figures.differing(text.replace(block, block.replace(number, changed, 1))) == ["digits"]


@pytest.mark.parametrize(
    "said", ["It took 22 s.", "in 2.6 minutes", "90.3 ± 0.2", "12 times as fast", "| 1,500 images/s |"]
)
def test_a_figure_without_a_record_is_found(said: str) -> None:
    assert loose("README.md", PAGES["README.md"] + said) != []


def test_a_changed_record_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = records.record("digits.json")
    run["metrics"]["shortcut_gap"]["matched"] += 0.1
    (tmp_path / "digits.json").write_text(json.dumps(run))
    for name in ("cifar10-cpu.json", "cifar10-fixed.json"):
        (tmp_path / name).write_bytes((records.RESULTS / name).read_bytes())
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert figures.differing(PAGES["README.md"]) == ["digits"]


def test_every_figure_is_shown_and_every_record_is_told_of() -> None:
    shown = {name for text in PAGES.values() for name, _ in figures.BLOCK.findall(text)}
    assert shown == set(figures.FIGURES)
    table = PAGES["benchmarks/README.md"]
    assert [p.name for p in records.RESULTS.iterdir() if f"`{p.name}`" not in table] == []


def test_bold_is_for_what_stands_beyond_noise() -> None:
    low, high = {"mean": 90.0, "accuracies": [89.0, 90.0, 91.0]}, {"mean": 95.0, "accuracies": [94.5, 95.0, 95.5]}
    near = {"mean": 90.6, "accuracies": [89.6, 90.6, 91.6]}
    assert runs.beats(high, low)
    assert not runs.beats(near, low)
    assert not runs.beats(low, high)
