"""Wrong use gives one clear line and status 2, from however many ranks, and starts nothing."""

from pathlib import Path

import pytest
import ranks
import yaml


def tree(out: Path) -> set[str]:
    return {p.name for p in out.rglob("*")} if out.exists() else set()


CASES = {
    "missing data directory": (["--data", "/nowhere/digits"], "/nowhere/digits"),
    "missing data directory with a preset": (["--data", "/nowhere/digits", "--preset", "digits"], "/nowhere/digits"),
    "unknown preset": (["--preset", "cifar"], "did you mean cifar10?"),
    "unknown setting": (["--matching.temprature", "2"], "did you mean --matching.temperature?"),
    "negative temperature": (["--matching.temperature", "-2"], "--matching.temperature"),
    "more images than the class has": (["--report.ipc", "5000"], "--report.ipc"),
    "a file for deepspeed alone": (["--deepspeed-config", "ds.json"], "--engine deepspeed"),
    "unknown classifier": (["--report.students", "convent"], "convnet"),
    "streams that do not divide the batch": (["--loader.streams", "3"], "--loader.streams"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_use_is_one_line(tiny, tmp_path, case):
    argv, says = CASES[case]
    line = ranks.refused(tmp_path / "out", [*tiny, *argv])
    assert says in line
    assert ";" in line
    assert not tree(tmp_path / "out") & {"teachers", "logits", "gan"}


def test_micro_batches_that_do_not_cut_a_batch_are_told_which_do(tiny, tmp_path):
    line = ranks.refused(tmp_path / "out", [*tiny, "--accumulate", "3"])
    assert "--accumulate 3 does not divide the 16 images of --gan.batch 16; use 1, 2, 4, 8 or 16" in line


def test_help_and_print_config_work_on_any_number_of_ranks(tiny, tmp_path):
    ended = ranks.start(tmp_path / "out", ["--help"]).wait()
    assert ended.codes == [0]
    assert "--matching.temperature" in ended.out[0]
    ended = ranks.start(tmp_path / "out", [*tiny, "--seed", "7", "--print_config"], 2).wait()
    assert ended.codes == [0, 0]
    assert ended.out[1] == ""
    assert yaml.safe_load(ended.out[0])["seed"] == 7
    assert not (tmp_path / "out").exists()
    file = tmp_path / "printed.yaml"
    file.write_text(ended.out[0])
    again = ranks.start(tmp_path / "out", ["--config", str(file), "--print_config"]).wait()
    assert again.out[0] == ended.out[0]


@pytest.mark.parametrize("where", ["/proc/gdd", "a file"])
def test_an_out_that_cannot_be_made_is_named(tiny, tmp_path, where):
    (tmp_path / "a file").write_text("")
    out = str(tmp_path / where)
    line = ranks.refused(tmp_path / "unused", [*tiny, "--out", out])
    assert out in line
    assert ";" in line


def test_debug_shows_the_traceback(tiny, tmp_path):
    ended = ranks.start(tmp_path / "out", [*tiny, "--accumulate", "3", "--debug"]).wait()
    assert ended.codes == [2]
    assert "Traceback" in ended.err[0]
    assert len(ended.errors) == 1
