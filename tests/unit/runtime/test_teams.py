"""One teacher on several ranks, in micro-batches, with activations computed again: the numbers of one rank that does all at once."""

import dataclasses
import functools
import signal
import time
from pathlib import Path

import hooks
import pytest
import ranks
import torch
from safetensors.torch import load_file

from gdd_dist.config import command_line
from gdd_dist.config.steps import TABLE
from gdd_dist.engines.ddp import DDPEngine
from gdd_dist.models.classifiers import CLASSIFIERS, Classifier, build_classifier, has_batch_norm
from gdd_dist.models.files import Teacher, save_network
from gdd_dist.pipeline.preflight import check_teams
from gdd_dist.runtime.memory import tensors_of
from gdd_dist.runtime.teams import Team
from gdd_dist.runtime.world import World
from gdd_dist.steps import teachers
from gdd_dist.storage.json_files import read_json
from gdd_dist.training.classifier_fit import sgd
from gdd_dist.training.context import train_order
from gdd_dist.training.skipped_steps import Skips
from sharding.errors import UserError

POOL = [
    *("--teachers.architectures", "resnet10:8", "convnet:8", "--teachers.seeds", "1", "--teachers.epochs", "2"),
    *("--until", "teachers", "--checkpoint_seconds", "0"),
]
IMAGES = 2 * 2 * 18 * 64 + 2 * 2 * 240
"""Of that pool: trainings × epochs × steps × batch, and trainings × snapshots × val."""

EARLY, LAST = 1e-5, 1e-3
"""How far weights may be apart after 12 and after 36 steps: by then a sum in another order, as of one rank on two threads, was
seen to move a ReLU of the ResNet over its edge, and a weight by 2.5e-4."""


def run(out: Path, tiny: list[str], size: int, *argv: str) -> dict:
    return ranks.train(out, [*tiny, *POOL, *argv], size)["teachers"]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One rank, all at once: OUT, and what steps.json says."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, run(out, tiny, 1)


def assert_same_teachers(alone, out: Path, found: dict) -> None:
    assert found["fingerprint"] == alone[1]["fingerprint"]
    one, two = (root / "teachers" / found["fingerprint"] for root in (alone[0], out))
    names = sorted(p.name for p in one.glob("*.safetensors"))
    assert len(names) == 4
    lasts = {t["file"] for t in read_json(one / "teachers.json")["teachers"] if t["last"]}
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        apart = max(float((a[key] - b[key]).abs().max()) for key in a)
        assert apart <= (LAST if name in lasts else EARLY), f"{name} is {apart} apart"


def test_two_ranks_train_a_teacher_as_one_does_and_the_dry_run_knew(alone, tiny, tmp_path):
    assert alone[1]["images_processed"] == IMAGES
    team = ["--teachers.ranks_per_teacher", "2"]
    said = ranks.start(tmp_path / "out", [*tiny, *POOL, *team, "--dry-run"], 2).wait()
    found = run(tmp_path / "out", tiny, 2, *team)
    assert_same_teachers(alone, tmp_path / "out", found)
    settling = 2 * 2 * 2  # trainings × ranks × forwards
    assert found["images_processed"] == IMAGES + settling
    (line,) = (text.split() for text in said.out[0].splitlines() if text.startswith("teachers"))
    assert line[:4] == ["teachers", "run", "72", f"{found['images_processed']:,}"], said.out[0]


def test_two_teams_in_micro_batches_with_activations_computed_again_train_as_one_rank_does(alone, tiny, tmp_path):
    argv = ["--teachers.ranks_per_teacher", "2", "--teachers.accumulate", "2"]
    found = run(tmp_path / "out", tiny, 4, *argv, "--teachers.activation_checkpointing", "true")
    assert_same_teachers(alone, tmp_path / "out", found)
    assert found["images_processed"] == IMAGES + 2 * 2 * 2  # what is computed again is not counted again


def network(name: str, size: int = 16) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(name, channels=1, size=size, classes=3, mean=[0.0], std=[1.0])


def batch(n: int = 8, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, size, size, generator=g) * 2 - 1, torch.randint(3, (n,), generator=g)


def after_steps(name: str, accumulate: int = 1, recompute: bool = False) -> dict[str, torch.Tensor]:
    """Weights and buffers after a few steps of one rank."""
    net = network(name)
    net.recompute = recompute
    world = World("cpu")
    torch.set_num_threads(1)
    engine = DDPEngine(net, sgd(net, 0.1, 0.9, 5e-4, nesterov=True), world, "float32", (), accumulate)
    for _ in range(3):
        teachers.teacher_step(engine, *batch(), 0.1, Skips())
    return net.state_dict()


WITHOUT = [name for name in CLASSIFIERS if not has_batch_norm(name)]


@pytest.mark.parametrize("name", WITHOUT)
def test_activations_computed_again_give_the_same_weights(name):
    plain, again = after_steps(f"{name}:8"), after_steps(f"{name}:8", recompute=True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[k], again[k]) for k in plain)


def test_micro_batches_give_the_same_weights():
    whole, parts = after_steps("resnet10:8"), after_steps("resnet10:8", accumulate=4)
    assert all(torch.allclose(whole[k], parts[k], rtol=0, atol=1e-5) for k in whole)
    assert not all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"recompute": True}])
def test_with_batch_norm_they_change_numbers(change):
    one, two = after_steps("resnet10_bn:8"), after_steps("resnet10_bn:8", **change)
    assert not all(torch.allclose(one[k], two[k], rtol=0, atol=1e-5) for k in one)


def test_activations_computed_again_take_less_memory():
    def peak(recompute: bool) -> int:
        net = network("resnet18:8")
        net.recompute = recompute
        return tensors_of(lambda: net(batch(32)[0]).sum().backward())

    assert peak(True) < 0.6 * peak(False)


def test_a_step_that_is_skipped_leaves_no_trace_in_a_batch_norm():
    net = network("resnet10_bn:8")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    engine = DDPEngine(net, sgd(net, 0.1, 0.9, 0.0), World("cpu"), "float32", ())
    torch.set_num_threads(1)
    images, labels = batch()
    skips = Skips()
    teachers.teacher_step(engine, images * float("nan"), labels, 0.1, skips)
    assert skips.total == 1
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    teachers.teacher_step(engine, images, labels, 0.1, skips)
    assert net.state_dict()["body.1.running_mean"].abs().max() > 0


def test_a_teacher_with_batch_norm_is_loaded_with_its_running_statistics(tmp_path):
    net = network("resnet10_bn:8")
    net(batch()[0])
    save_network(tmp_path / "a.safetensors", net, {})
    loaded = Teacher(0, tmp_path / "a.safetensors", "resnet10_bn:8", True, 50.0).load(1, 16, 3)
    assert torch.equal(loaded(batch()[0]), net.eval()(batch()[0]))


@pytest.mark.parametrize(
    "change",
    [["ranks_per_teacher", "2"], ["accumulate", "2"], ["activation_checkpointing", "true"]],
    ids=lambda change: change[0],
)
def test_they_are_in_the_fingerprint_with_batch_norm_alone(change):
    def shaping(name: str, *argv: str) -> dict:
        return TABLE["teachers"].settings(
            command_line.parse(["--teachers.architectures", "convnet", name, *argv]).config
        )

    argv = [f"--teachers.{change[0]}", change[1]]
    assert shaping("resnet10") == shaping("resnet10", *argv)
    assert shaping("resnet10_bn") != shaping("resnet10_bn", *argv)
    assert change[0] not in shaping("resnet10")


def test_a_world_that_teams_do_not_divide_is_refused_in_one_line(tiny, tmp_path):
    line = ranks.refused(tmp_path / "out", [*tiny, "--teachers.ranks_per_teacher", "3"], 2)
    assert "--teachers.ranks_per_teacher 3 does not divide the 2 ranks; use 1 or 2" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ranks_per_teacher": 4, "batch": 6}, "does not divide the 6 streams of --teachers.batch 6; use 1, 2, 3 or 6"),
        (
            {"accumulate": 5},
            "--teachers.accumulate 5 does not divide a rank's 64 images of a teacher's batch; use 1, 2",
        ),
        ({"accumulate": 64, "architectures": ("resnet18_bn:8",)}, "lower --teachers.accumulate"),
    ],
)
def test_batches_that_cannot_be_cut_so_are_refused(changes, says):
    found = command_line.parse(["--preset", "digits"]).config
    found = dataclasses.replace(found, teachers=dataclasses.replace(found.teachers, **changes))
    with pytest.raises(UserError, match=says):
        check_teams(found, 4)


def test_streams_for_thousands_of_ranks_leave_a_teachers_smaller_batch_alone():
    argv = ["--preset", "digits", "--loader.streams", "512", "--gan.batch", "512", "--teachers.batch", "96"]
    found = command_line.parse(argv).config
    check_teams(found, 4)
    assert train_order(found, "teachers", [500, 500], "teacher").streams == 32
    assert train_order(found, "gan", [500, 500], "gan").streams == 512


def test_a_student_may_have_no_batch_norm(tiny, tmp_path):
    assert "can only be a teacher" in ranks.refused(tmp_path / "out", [*tiny, "--report.students", "resnet10_bn"])


def agree(rank):
    world = World("cpu").join()
    team = Team(world, 2)
    taken = []
    for job in team.queue(12):
        time.sleep(0.05 if rank < 2 else 0.01)
        taken.append(job)
    found = {
        "place": (team.rank, team.size, team.count, team.is_main),
        "taken": taken,
        "next": list(team.queue(3)),
        "broadcast": team.broadcast({"from": rank}),
        "sent": team.send(bytes([rank]) * 1000),
        "mean": team.mean({"rank": torch.tensor(float(rank))})["rank"],
        "vote": team.vote(save=rank in (0, 3)).result(),
    }
    world.barrier()
    world.close()
    return found


def test_a_team_does_alike_and_teams_share_what_there_is_to_do(tmp_path):
    found = ranks.call(tmp_path, 4, agree)
    assert [f["place"] for f in found] == [(0, 2, 2, True), (1, 2, 2, False)] * 2
    for name in ("taken", "next"):
        assert found[0][name] == found[1][name]
        assert found[2][name] == found[3][name]
        assert sorted(found[0][name] + found[2][name]) == list(range(12 if name == "taken" else 3))
    assert len(found[0]["taken"]) < 6
    assert [f["broadcast"]["from"] for f in found] == [0, 0, 2, 2]
    assert [f["sent"][0] for f in found] == [0, 0, 2, 2]
    assert [f["mean"] for f in found] == [0.5, 0.5, 2.5, 2.5]
    assert [bool(f["vote"][1]) for f in found] == [True, True, False, False]  # only the leader says when to save


FOUR = ["--teachers.ranks_per_teacher", "4", "--teachers.accumulate", "2"]


def end_of(job: ranks.Job) -> ranks.Ended:
    """A job of which one rank was killed."""
    job.until(lambda: any(p.exitcode == -signal.SIGKILL for p in job.processes))
    return job.wait_as_torchrun()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2], ids=["leader", "member"])
def test_after_a_kill_in_a_team_the_same_command_ends_with_the_same_bits(tiny, tmp_path, victim):
    """Four ranks in one team: with two, summation order cannot show."""
    undisturbed = run(tmp_path / "undisturbed", tiny, 4, *FOUR)
    hook = functools.partial(hooks.signal_in, where="teachers", call=50, number=signal.SIGKILL, victim=victim)
    ended = end_of(ranks.start(tmp_path / "out", [*tiny, *POOL, *FOUR], 4, before=hook))
    assert not ended.errors, ended.text
    found = run(tmp_path / "out", tiny, 4, *FOUR)
    assert found["status"] == "resumed"
    assert 0 < found["images_processed"] < 0.7 * undisturbed["images_processed"]
    one, two = (tmp_path / name / "teachers" / found["fingerprint"] for name in ("undisturbed", "out"))
    for path in one.glob("*.safetensors"):
        assert ranks.weights(path) == ranks.weights(two / path.name), path.name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_member_that_hangs_or_is_preempted_ends_the_job_which_goes_on(alone, tiny, tmp_path, number):
    """Two teams: the other one learns it too."""
    argv = ["--teachers.ranks_per_teacher", "2", "--timeout", "10"]
    hook = functools.partial(hooks.signal_in, where="teachers", call=20, number=number, victim=3)
    job = ranks.start(tmp_path / "out", [*tiny, *POOL, *argv], 4, before=hook)
    if number == signal.SIGSTOP:
        ended = end_of(job)
        assert len(ended.errors) == 1, ended.text
        assert "rank 3 (process" in ended.errors[0]
        assert "in step teachers) has sent no heartbeat for 10 s" in ended.errors[0]
    else:
        ended = job.wait()
        assert ended.codes == [128 + number] * 4, ended.text
        assert (tmp_path / "out" / "preempted").exists()
    found = run(tmp_path / "out", tiny, 4, *argv)
    assert found["status"] == "resumed"
    assert found["images_processed"] < IMAGES
    assert_same_teachers(alone, tmp_path / "out", found)
