"""What each command loads before it answers, and what a run has loaded when its first optimizer step is done."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gdd_dist.config import command_line

ROOT = Path(__file__).parents[2]
HEAVY = {
    "deepspeed",
    "matplotlib",
    "optuna",
    "ray",
    "sklearn",
    "tensorboard",
    "torch",
    "torchvision",
    "webdataset",
}
NOT_TO_TRAIN = HEAVY - {"torch", "tensorboard"} | {"torch._dynamo", "torch._inductor", "sympy", "triton"}
ANSWERS = {
    "train --help": ["-m", "gdd_dist.train", "--help"],
    "train --print_config": ["-m", "gdd_dist.train", "--print_config"],
    "train --version": ["-m", "gdd_dist.train", "--version"],
    "train, an unknown setting": ["-m", "gdd_dist.train", "--matching.temprature", "2"],
    "train, a value of the wrong type": ["-m", "gdd_dist.train", "--gan.steps", "many"],
    "train, a value out of bounds": ["-m", "gdd_dist.train", "--gan.steps", "0"],
    "completion": ["-m", "gdd_dist.completion", "bash"],
    "evaluate --help": ["-m", "gdd_dist.evaluate", "--help"],
    "evaluate of no run": ["-m", "gdd_dist.evaluate", "nowhere"],
    "export --help": ["-m", "gdd_dist.export", "--help"],
    "export without a size": ["-m", "gdd_dist.export", "out", "dest"],
    "doctor --help": ["-m", "gdd_dist.doctor", "--help"],
    "doctor --version": ["-m", "gdd_dist.doctor", "--version"],
    "status of no run": ["-m", "gdd_dist.status", "nowhere"],
    "sharding --help": ["-m", "sharding", "--help"],
    "sharding --version": ["-m", "sharding", "--version"],
    "sharding info of nothing": ["-m", "sharding", "info", "nowhere"],
    "search --help": [str(ROOT / "tune" / "search.py"), "--help"],
    "search --version": [str(ROOT / "tune" / "search.py"), "--version"],
}


def loaded(command: Sequence[str], cwd: Path) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """All modules that a command imports, and what came of it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=cwd, env=env, capture_output=True, text=True
    )
    return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M)), done


def ours(modules: set[str]) -> set[str]:
    """The project's own modules among them, without the packages' __init__.py."""
    return {name for name in modules if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}


@pytest.mark.parametrize("command", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_loads_nothing_heavy(command, tmp_path):
    modules, done = loaded(command, tmp_path)
    assert done.returncode == (0 if done.stdout else 2), done.stderr
    assert len(ours(modules)) > 3  # the modules were seen
    assert not modules & HEAVY


def test_every_program_says_its_version(tmp_path):
    for command in ANSWERS.values():
        if command[-1] == "--version":
            assert re.search(r" \d+\.\d+\.\d+$", loaded(command, tmp_path)[1].stdout.strip())


@pytest.fixture
def begun(digits, tmp_path) -> Path:
    """The OUT of a run that was started and did nothing."""
    command = command_line.parse(["--data", str(digits), "--out", str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(command_line.to_yaml(command.config, command.preset))
    return tmp_path / "out"


def test_status_loads_little(begun, tmp_path):
    modules, done = loaded(["-m", "gdd_dist.status", str(begun)], tmp_path)
    assert "to do" in done.stdout, done.stderr
    assert not modules & HEAVY
    assert len(ours(modules)) <= 32


def test_the_doctor_loads_little_before_it_looks(tmp_path):
    modules, _ = loaded(["-m", "gdd_dist.doctor", "--help"], tmp_path)
    assert len(ours(modules)) <= 14


def test_drawing_from_a_file_loads_what_draws(tmp_path):
    modules, done = loaded(["-c", "import gdd_dist; gdd_dist.load_generator"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch" in modules
    assert not modules & NOT_TO_TRAIN
    assert len(ours(modules)) <= 12


FIRST_STEP = """
import json, sys, time
begin = time.monotonic()
from gdd_dist import train
from gdd_dist.runtime.run_program import run_program
def watch(argv, joined):
    def then(world):
        joined(world)
        from gdd_dist.training import loop
        loop.watchers.append(First())
    class First:
        def batches(self, trainee, start, batches):
            return batches
        def before_step(self, trainee, step):
            pass
        def after_step(self, trainee, step):
            print(json.dumps([time.monotonic() - begin, sorted(sys.modules)]), flush=True)
            sys.stdin.read()
    train.main(argv, then)
run_program(watch, sys.argv[1:])
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_optimizer_step_needs_torch_and_nothing_heavy_beside_it(ranks, digits, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if ranks > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", FIRST_STEP, "--data", str(digits), "--out", str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for rank, process in enumerate(processes):
            seconds, modules = json.loads(process.stdout.readline())
            print(f"rank {rank} of {ranks}: {len(modules)} modules, {seconds:.1f} s")
            assert "torch" in modules
            assert not NOT_TO_TRAIN & set(modules)
            assert ("tensorboard" in modules) == (rank == 0)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
