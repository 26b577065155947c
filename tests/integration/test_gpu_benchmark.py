"""The whole of benchmarks/gpu.py: rehearsed on the CPU from a copied tree with few libraries, and on a GPU where there is one."""

import json
import subprocess
from pathlib import Path

import bare
import pytest

GPUS = sorted(Path("/dev").glob("nvidia[0-9]*"))
needs_gpu = pytest.mark.skipif(not GPUS, reason="no CUDA device here (no /dev/nvidia0)")


def record(out):
    return [json.loads(line) for line in (out / "gpu.jsonl").open()]


@pytest.mark.slow
def test_every_phase_ends_on_a_cpu_from_a_copied_tree_with_few_libraries(tmp_path):
    python, tree = bare.environment(tmp_path / "environment"), bare.tree(tmp_path / "tree")
    probe = "import importlib.util as u; print([n for n in ('deepspeed', 'ray', 'pytest', 'sklearn', 'gdd_dist') if u.find_spec(n)])"
    seen = subprocess.run([python, "-c", probe], cwd=tmp_path, env=bare.clean(), capture_output=True, text=True)
    assert seen.stdout.strip() == "[]", seen.stderr
    command = [python, tree / "benchmarks/gpu.py", tmp_path / "out", "--device", "cpu", "--minutes", "90"]
    ended = subprocess.run(command, cwd=tmp_path, env=bare.clean(), capture_output=True, text=True)
    lines = record(tmp_path / "out")
    listed = subprocess.run([*command[:2], "x", "--list"], env=bare.clean(), capture_output=True, text=True).stdout
    phases = [line.split()[0] for line in listed.splitlines()]
    assert len(phases) > 10
    status = {line["phase"]: line["status"] for line in lines if "status" in line}
    assert status == dict.fromkeys(phases, "ok"), [line for line in lines if "error" in line]
    assert ended.returncode == 0
    rows = [line["row"] for line in lines if "row" in line]
    assert {row["train_on"] for row in rows} >= {"full", "real", "gaussian", "matched"}


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """What the phases that check find on a GPU, at a rehearsal's sizes."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    phases = ["environment", "shards", "agreement", "skip", "synchronisations", "resume", "captured", "one-rank"]
    env = {
        k: v for k, v in bare.clean().items() if k != "CUDA_VISIBLE_DEVICES"
    }  # which hides GPUs from all other tests
    command = [bare.sys.executable, bare.ROOT / "benchmarks/gpu.py", out, "--phases", *phases]
    subprocess.run(command, cwd=bare.ROOT, env=env)
    return record(out)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["environment", "shards", "agreement", "skip", "captured", "one-rank"])
def test_a_gpu_does_what_the_cpu_does(on_gpu, phase):
    """Losses to 1e-4 in float32 and 3e-2 in bf16; fp16 skips what overflows; a replayed step is the step;
    images are equal wherever they are kept.
    """
    (ended,) = (line for line in on_gpu if line["phase"] == phase and "status" in line)
    assert ended["status"] == "ok", ended


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("step", ["teachers", "gan", "matching", "student"])
def test_a_step_makes_the_host_wait_for_nothing(on_gpu, step):
    found = [line for line in on_gpu if line["phase"] == "synchronisations" and line.get("step") == step]
    assert [line["start"] for line in found] == ["noise", "gaussian"][: 1 + (step in ("gan", "matching"))]
    for line in found:
        assert line["reported"] == 0, line["places"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("step", ["gan", "matching"])
def test_a_deterministic_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(on_gpu, step):
    (found,) = (line for line in on_gpu if line["phase"] == "resume" and line.get("step") == step)
    assert found["promised"]
    assert found["equal_bits"]
