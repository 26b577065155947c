"""One command, all steps; the same command again, nothing (design 5.5)."""

import json
import re
import shutil
from pathlib import Path

import hooks
import pytest
import ranks
from events import others, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gdd_dist.models.files import read_network

STEPS = ["shards", "teachers", "logits", "gaussian", "gan", "matching", "report"]


def rows(out: Path) -> dict[str, str]:
    """File name → what the student was trained on, of every student that was ever trained."""
    return {p.name: json.loads(p.read_text())["train_on"] for p in (out / "report" / "rows").glob("*.json")}


def test_one_process_computes_every_step_and_ends_with_the_table(reported):
    assert list(reported.steps) == STEPS
    assert {s: r["status"] for s, r in reported.steps.items()} == {"shards": "reused"} | dict.fromkeys(
        STEPS[1:], "computed"
    )
    assert all(reported.steps[s]["images_processed"] > 0 for s in STEPS[1:])
    for step in STEPS[1:]:
        link = reported.out / step / "latest"
        assert not link.readlink().is_absolute()
        assert link.resolve() == reported.out / step / reported.steps[step]["fingerprint"]
    latest = reported.out / "report" / "latest"
    assert {"metrics.json", "report.md", "samples.png", "curves.png"} <= {p.name for p in latest.iterdir()}
    assert {r["train_on"] for r in json.loads((latest / "metrics.json").read_text())["results"]} == {
        "full",
        "real",
        "equal_bytes",
        "gaussian",
        "gan",
        "matched",
    }
    picture = reported.out / "samples-gan.png"
    assert f"before matching: {picture}\n" in reported.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(reported.out.rglob("*.partial"))
    assert not list(reported.out.rglob("*.lock"))
    assert not list(reported.out.rglob("*.tmp"))


def test_two_ranks_compute_every_step_and_rank_0_prints_the_table(tiny, tmp_path):
    ended = ranks.start(tmp_path / "out", tiny, 2).wait()
    assert ended.codes == [0, 0], ended.text
    assert "ceiling share" in ended.out[0]
    assert f"report: {tmp_path}/out/report/latest/report.md" in ended.out[0]
    assert ended.out[1] == ""
    assert {r["status"] for s, r in ranks.steps(tmp_path / "out").items() if s != "shards"} == {"computed"}


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_command_again_forwards_no_image(reported, tmp_path, size):
    out = shutil.copytree(reported.out, tmp_path / "out", symlinks=True)
    before = {p: p.stat().st_mtime_ns for s in STEPS for p in (out / s).rglob("*") if p.is_file()}
    ended = ranks.start(out, reported.argv, size, before=hooks.no_forward).wait()
    assert ended.codes == [0] * size, ended.text
    assert "ceiling share" in ended.out[0]
    found = ranks.steps(out)
    assert list(found) == STEPS
    assert {(r["status"], r["images_processed"]) for r in found.values()} == {("reused", 0)}
    assert before == {p: p.stat().st_mtime_ns for s in STEPS for p in (out / s).rglob("*") if p.is_file()}


def test_a_changed_temperature_runs_matching_and_the_rows_that_read_it_and_nothing_else(reported, tmp_path):
    out = shutil.copytree(reported.out, tmp_path / "out", symlinks=True)
    known = rows(out)
    found = ranks.train(out, [*reported.argv, "--matching.temperature", "4"])
    assert {s: r["status"] for s, r in found.items()} == dict.fromkeys(STEPS[:5], "reused") | dict.fromkeys(
        STEPS[5:], "computed"
    )
    assert [found[s]["images_processed"] for s in STEPS[:5]] == [0] * 5
    assert found["matching"]["fingerprint"] != reported.steps["matching"]["fingerprint"]
    new = {name: train_on for name, train_on in rows(out).items() if name not in known}
    wanted = [
        kind for kind in known.values() if kind in ("matched", "equal_bytes")
    ]  # the latter reads the size of the file
    assert sorted(new.values()) == sorted(wanted)


def test_what_only_says_where_or_how_fast_changes_no_fingerprint(reported, tmp_path):
    out = tmp_path / "elsewhere"
    argv = [*reported.argv, "--store", str(reported.out), "--loader.resident", "none", "--loader.prefetch", "1"]
    found = ranks.train(out, [*argv, "--checkpoint_seconds", "0", "--logits.batch", "7", "--timeout", "99"])
    assert {r["status"] for r in found.values()} == {"reused"}
    assert (out / "matching" / "latest").resolve().parent == reported.out / "matching"


def test_the_digits_are_built_in_out_on_first_use(tmp_path):
    out = tmp_path / "out"
    found = ranks.train(out, ["--until", "shards"], 2)
    assert [(s, r["status"]) for s, r in found.items()] == [("shards", "computed")]
    assert (out / "data" / "manifest.json").exists()
    assert ranks.train(out, ["--until", "shards"])["shards"]["status"] == "reused"


def test_a_generator_says_what_made_it(reported):
    for step in ("gan", "matching"):
        meta = read_network(reported.out / step / "latest" / "generator.safetensors")[1]
        made = meta["provenance"]
        assert meta["classes"] == [str(n) for n in range(10)]
        assert made["fingerprints"].items() >= {s: reported.steps[s]["fingerprint"] for s in STEPS[:5]}.items()
        assert {"torch", "numpy", "gdd_dist"} <= set(made["versions"])
        assert made.keys() >= {"commit", "seed", "precision", "created", "data"}
    assert len(meta["history"]) == 3  # matching: at 0, 6 and 12 steps


def test_tensorboard_shows_each_step(reported):
    """Losses, learning rates, speed, accuracies, logits, pictures, the settings; each point once."""
    found = scalars(reported.out / "tensorboard")
    assert found.keys() >= {
        *(f"gan/{n}" for n in ("loss_g", "loss_d", "lr", "images_per_second")),
        *(f"matching/{n}" for n in ("loss", "pair", "lr", "val_accuracy", "shortcut_gap", "images_per_second")),
        *(f"teachers/{n}" for n in ("loss/convnet:8/0", "loss/convnet:8/1", "lr", "val_accuracy")),
    }
    assert any(tag.startswith("report/accuracy") for tag in found)
    assert list(found["matching/loss"]) == list(found["gan/loss_g"]) == list(range(12))
    assert list(found["matching/val_accuracy"]) == [0, 6, 12]
    assert len(found["teachers/val_accuracy"]) == 4
    tags = others(reported.out / "tensorboard")
    assert tags["images"] >= {"gan/samples", "matching/samples"}
    assert tags["histograms"] >= {
        "logits/teacher_logits",
        "matching/teacher_answers/real",
        "matching/teacher_answers/generated",
    }
    assert "config/text_summary" in tags["tensors"]


def runs(out: Path, step: str) -> list[EventAccumulator]:
    """A step's event files, all points kept."""
    directories = {p.parent for p in (out / "tensorboard" / step).rglob("events.out.tfevents.*")}
    sizes = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return [EventAccumulator(str(d), size_guidance=sizes).Reload() for d in directories]


def test_tensorboard_shows_one_latent_grid_over_time(reported):
    """The same latents at every interval: pictures of one size, and another picture once the weights have moved."""
    (gan,) = runs(reported.out, "gan")
    assert [g.step for g in gan.Images("gan/samples")] == [0, 11]
    (events,) = runs(reported.out, "matching")
    grids = events.Images("matching/samples")
    assert [g.step for g in grids] == [0, 6, 12]
    assert len({(g.width, g.height) for g in grids}) == 1
    assert grids[0].encoded_image_string != grids[-1].encoded_image_string


def test_tensorboard_histograms_hold_both_sides_answers(reported):
    (events,) = runs(reported.out, "matching")
    for side in ("real", "generated"):
        found = events.Histograms(f"matching/teacher_answers/{side}")
        assert [h.step for h in found] == [0, 6, 11]
        for h in found:
            assert h.histogram_value.num == 16 * 10
            # Standardized over ten classes: mean 0, unbiased standard deviation 1.
            assert h.histogram_value.sum == pytest.approx(0, abs=1e-2)
            assert h.histogram_value.sum_squares == pytest.approx(16 * 9, rel=1e-3)


def test_tensorboard_says_units_what_matters_and_settings_beside_results(reported):
    (matching,) = runs(reported.out, "matching")
    assert matching.SummaryMetadata("matching/shortcut_gap").summary_description.startswith("percentage points")
    assert "per second" in matching.SummaryMetadata("matching/images_per_second").summary_description
    (overview,) = runs(reported.out, "overview")
    layout = layout_pb2.Layout.FromString(overview.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    wanted = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    there = set(scalars(reported.out / "tensorboard"))
    for pattern in wanted:
        assert any(re.fullmatch(pattern, tag) for tag in there), f"nothing is shown for {pattern}"
    (report,) = runs(reported.out, "report")
    start = HParamsPluginData.FromString(
        report.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    assert start.hparams["matching.temperature"].number_value == 2.0
    assert start.hparams["teachers.architectures"].string_value == "('convnet:8',)"
    experiment = HParamsPluginData.FromString(
        report.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment
    assert {"report/result/matched", "report/result/real"} <= {m.name.tag for m in experiment.metric_infos} <= there
