"""The report: metrics.json, report.md, two pictures; what the table and the headline say."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser, needed
from made_runs import HISTORY, Made, make, settings
from PIL import Image

from gdd_dist.config import command_line as configuration
from gdd_dist.config.settings import Config, Matching
from gdd_dist.config.steps import TABLE
from gdd_dist.evaluation.quick_students import Candidates, best
from gdd_dist.reporting import diagnostics, training_figures
from gdd_dist.reporting.html_page import html
from gdd_dist.reporting.metrics import shortcut_gap
from gdd_dist.reporting.tables import headline, markdown, markdown_table, table
from gdd_dist.steps import report

PICTURES = ("samples.png", "curves.png", "classes.png", "confusion.png", "answers.png", "neighbours.png")


def row(train_on: str, mean: float, **changed: Any) -> dict[str, Any]:
    return {
        "train_on": train_on,
        "student": "convnet",
        "protocol": "regenerate",
        "labels": "hard",
        "ipc": 1,
        "optimizer_steps": 400,
        "batch": 10,
        "images_seen": 4000,
        "distinct_images_seen": 4000,
        "mean": mean,
        "std": 0.5,
        "seeds": [0, 1],
        "accuracies": [mean - 0.35, mean + 0.35],
        "ceiling_share": (mean - 10) / 87,
        **changed,
    }


ROWS = [
    row("full", 98.5, protocol=None, ipc=None, ceiling_share=None, std=None),
    row("real", 97.0),
    row("gan", 85.0),
    row("matched", 93.0),
]


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("report") / "out", digits)


@pytest.fixture(scope="module")
def written(made: Made) -> Path:
    """The directory that the step leaves."""
    work = made.out / "report" / "fedcba9876543210.partial"
    work.mkdir(parents=True)
    numbers = report.run(made.context(settings()), work, made.inputs)
    assert {"full", "real", "equal_bytes", "gaussian", "gan", "matched"} <= set(numbers)
    return work


def test_the_table_shows_budget_deviation_and_ceiling_share() -> None:
    lines = table(ROWS).splitlines()
    assert " ".join(lines[0].split()) == (
        "train on student protocol labels IPC steps batch images seen distinct MB accuracy % ceiling share"
    )
    matched = next(line for line in lines if line.startswith("matched"))
    assert " ".join(matched.split()) == "matched convnet regenerate hard 1 400 10 4,000 4,000 – 93.0 ± 0.5 95 %"
    full = next(line for line in lines if line.startswith("full"))
    assert full.split()[-2:] == ["98.5", "–"]
    assert len({len(line) for line in lines if line and "–" not in line}) == 1


def test_the_headline_compares_rows_of_one_budget() -> None:
    text = headline(ROWS)
    assert "**93.0 ± 0.5 %**" in text
    assert "85.0 ± 0.5 % with the GAN before matching" in text
    assert "97.0 ± 0.5 % with real images at the same budget" in text
    assert "95 % of the way" in text
    alone = headline([row("matched", 93.0, ceiling_share=None)])
    assert "against" not in alone
    assert "way from" not in alone


def test_markdown_keeps_a_bar_inside_a_cell() -> None:
    assert markdown(("a", "b"), [("x|y", "1")]).splitlines()[2] == "| x\\|y | 1 |"


def test_best_keeps_the_first_best_interval_and_last_the_last() -> None:
    tied = [*HISTORY, {**HISTORY[1], "step": 15}]
    assert best(tied, "best") == HISTORY[1]
    assert best(tied, "last") == tied[-1]
    assert best([], "best") is None
    of_intervals = {"gan": 9.0, "matched": 8.0, "selected_step": 5, "selected": "matching"}
    assert shortcut_gap(Candidates(HISTORY), "best") == of_intervals
    assert shortcut_gap(Candidates(), "best") is None


def test_another_generator_is_kept_where_no_interval_is_better_and_its_own_gap_is_told() -> None:
    equal, better = ({"step": 0, "val": v, "stderr": 1.0, "gap": 2.0} for v in (60.0, 61.0))
    assert Candidates(HISTORY, {"gaussian": equal}).kept("best") == ("matching", HISTORY[1])
    found = Candidates(HISTORY, {"gaussian": equal, "another": better})
    assert found.kept("best") == ("another", better)
    assert found.kept("last") == ("matching", HISTORY[-1])
    gaps = {"gan": 9.0, "matched": 2.0, "selected_step": None, "selected": "another"}
    assert shortcut_gap(found, "best") == gaps


def test_settings_name_what_shapes_the_report_and_no_matching_setting() -> None:
    config = dataclasses.replace(settings(), matching=Matching(temperature=4.0))
    shaping = TABLE["report"].settings
    assert shaping(config) == shaping(settings())
    assert shaping(Config()) != shaping(settings())


def test_metrics_hold_what_the_format_names(written: Path, made: Made) -> None:
    text = (written / "metrics.json").read_text()
    metrics = json.loads(text)
    assert " ".join(metrics) == (
        "format fingerprints hardware versions commit verified classes shortcut_gap nearest results"
    )
    assert metrics["nearest"].keys() == {"median_generated", "median_held_out", "close_share"}
    assert metrics["format"] == "gdd-report/1"
    assert metrics["fingerprints"] == {
        "data": made.manifest.fingerprint,
        "teachers": made.fingerprints["teachers"],
        "logits": made.fingerprints["logits"],
        "generator": made.fingerprints["matching"],
    }
    assert metrics["verified"] is True
    assert metrics["classes"] == [str(i) for i in range(10)]
    assert len(metrics["results"]) == 19
    for r in metrics["results"]:
        drawn = r["train_on"] in ("gan", "matched")
        assert (r["lrs"] is not None) == drawn
        assert (r["ars"] is not None) == (r["train_on"] == "matched" and r["protocol"] == "fixed")
        assert all(0 <= r[k] <= 1 for k in ("lrs", "ars") if r[k] is not None)


def test_no_path_of_this_machine_is_written(written: Path, made: Made) -> None:
    for name in ("metrics.json", "report.md", "report.html"):
        text = (written / name).read_text()
        for path in (made.out, made.data, Path.home(), Path(report.__file__).parent):
            assert str(path) not in text


def test_the_page_holds_rows_history_settings_and_timings(written: Path, made: Made) -> None:
    text = (written / "report.md").read_text()
    for row_name in ("| full |", "| real |", "| gan |", "| matched |"):
        assert row_name in text
    assert "| step 5 | 60.0 | 1.0 | 8.0 | kept |" in text
    assert "| gan | computed | – | – | – |" in text  # as it was computed before steps noted what they cost
    assert "| report | computed |" in text
    for heading in ("Rows", "Classes", "Training", "Teacher logits", "Does it memorise?", "How to reproduce it"):
        assert f"## {heading}" in text
    assert (
        "| IPC | accuracy % | ceiling share | balanced % | LRS | ARS | steps |"
        in text.splitlines()[text.splitlines().index("## Rows") + 2]
    )
    assert "temperature: 2.0" in text
    assert made.fingerprints["matching"] in text
    assert "The sha256 of every input file was checked first." in text
    assert "no-verify" not in text


def test_the_page_says_that_nothing_was_hashed(written: Path, made: Made, tmp_path: Path) -> None:
    config = dataclasses.replace(settings(), verify=False)
    ctx = made.context(config)
    report.run(ctx, tmp_path, made.inputs)
    assert "The sha256 of input files was not checked (`--no-verify`)" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["verified"] is False
    # Every student was there already: only the pictures' images went through a network.
    assert ctx.forwards == 2 * 10 * report.SAMPLE_COLUMNS + diagnostics.FORWARDS


def test_a_killed_report_says_that_it_was_resumed(made: Made, tmp_path: Path) -> None:
    config, work = settings(baselines=("gan",), labels=("hard",)), tmp_path / "work"
    first = made.context(config, tmp_path)
    report._note_start(first, work, 1)
    assert not first.resumed
    again = made.context(config, tmp_path)
    report._note_start(again, work, 1)
    assert not again.resumed
    report._note_start(again, work, 2)
    assert again.resumed


def test_the_pictures_are_pictures(written: Path) -> None:
    for name in PICTURES:
        with Image.open(written / name) as image:
            pixels = np.asarray(image.convert("L"))
            assert min(image.size) > 400
            assert pixels.std() > 10


def test_curves_are_drawn_without_event_files_history_or_some_rows() -> None:
    teachers = [{"architecture": "convnet", "seed": 0, "step": 5, "val_accuracy": 50.0}]
    bare = training_figures.curves_figure(teachers, {}, [], None, [row("matched", 93.0, std=None)])
    assert training_figures.pixels(bare).shape[2] == 3


def test_a_mosaic_keeps_pixels_and_parts_images_with_white() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2, 1)
    picture = training_figures.mosaic(images, gap=1)
    assert picture.shape == (5, 8, 1)
    assert (picture[2] == 255).all()
    assert (picture[3:5, 6:8] == images[1, 2]).all()


def test_the_settings_of_the_page_are_a_file_that_config_reads_and_give_the_same_run(
    written: Path, made: Made, tmp_path: Path
) -> None:
    text = (written / "report.md").read_text()
    path = tmp_path / "settings.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    again = configuration.parse(["--config", str(path), "--data", str(made.data)]).config
    for section in ("teachers", "logits", "gan", "matching", "report", "loader"):
        assert again.shaping(section) == settings().shaping(section)
    assert (again.seed, again.precision) == (0, "float32")


def test_the_html_page_is_one_file_that_asks_no_network_for_anything(written: Path) -> None:
    text = (written / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sum(s.startswith("data:image/png;base64,") for s in sources) == len(PICTURES)
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    for picture in PICTURES:
        assert base64.b64encode((written / picture).read_bytes()).decode() in text
    for link in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{link}"' in text
    assert "<title>Distilled: digits</title>" in text
    assert text.index("Did it work?") < text.index('<svg class="acc"') < text.index("<h2")
    assert "xmlns" in (written / "accuracy.svg").read_text()


def test_names_that_hold_markup_stay_names(made: Made, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|x"
    manifest = dataclasses.replace(made.manifest, name=evil, classes=(evil, *made.manifest.classes[1:]))
    report.run(dataclasses.replace(made, manifest=manifest).context(settings()), tmp_path, made.inputs)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text or "&lt;script>" in text


def test_a_picture_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError):
        html("# x\n\n![a](b.png)\n", {})


def test_balanced_accuracy_stands_beside_accuracy_where_classes_are_unequal() -> None:
    equal = [row("matched", 93.0, balanced_mean=93.0)]
    unequal = [row("matched", 93.0, balanced_mean=81.5)]
    assert "balanced" not in markdown_table(equal)
    assert "balanced %" in markdown_table(unequal)
    assert "81.5" in markdown_table(unequal)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


FACTS = """return {
    page: document.documentElement.scrollWidth, window: innerWidth, images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    hidden: [...document.images].filter(i => i.getBoundingClientRect().width < 200).length,
    beyond: [...document.querySelectorAll("h1, h2, p, li, nav, pre, .scroll")].filter(e =>
        e.getBoundingClientRect().right > innerWidth).length,
}"""


@pytest.mark.browser
@needed
@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_shows_the_page_whole_on_a_wide_and_on_a_narrow_screen(
    written: Path, window: Browser, width: int
) -> None:
    window.open((written / "report.html").as_uri(), width, 900)
    facts = window.run(FACTS)
    assert facts.pop("page") <= facts.pop("window") == width, "the page scrolls sideways"
    assert facts == {"images": len(PICTURES), "broken": 0, "hidden": 0, "beyond": 0}
    accuracy = "return [...document.querySelectorAll('th')].find(e => e.textContent == 'accuracy %')"
    assert window.run(f"{accuracy}.getBoundingClientRect().right") <= width, "one has to scroll for the accuracy"
    assert not window.strangers()
    for band in np.array_split(window.picture(whole=True).mean(2), 12):
        assert band.std() > 3, "a part of the page is blank"
