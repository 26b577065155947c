"""Ranks agree, share work, stop together, and say what went wrong once."""

import errno
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ranks
import torch

import gdd_dist.runtime.heartbeat as heartbeat
import gdd_dist.runtime.rendezvous as rendezvous
import gdd_dist.runtime.world as world_module
from gdd_dist.config.settings import Config
from gdd_dist.runtime.devices import allow_tf32
from gdd_dist.runtime.heartbeat import Watch
from gdd_dist.runtime.run_program import describe, explained, run_program
from gdd_dist.runtime.signals import Asked, PeerError, asked
from gdd_dist.runtime.world import World
from gdd_dist.training.context import agreed_precision
from sharding.errors import UserError

SIZE = 4


def agree(rank):
    world = World("cpu").join()
    found = {
        "rank": (world.rank, world.size, world.is_main),
        "gather": world.gather({"rank": rank, "text": "ä", "none": None}),
        "again": [world.gather(rank * 10 + i) for i in range(3)],
        "broadcast": world.broadcast([1.5, "main"] if rank == 0 else "not this"),
        "sum": world.sum(2**rank),
        "mean": world.mean({"a": torch.tensor(float(rank)), "b": torch.tensor(1.0)}),
    }
    taken = []
    for job in world.queue(20):
        time.sleep(0.01 if rank else 0.05)
        taken.append(job)
    found["queue"] = taken
    found["empty"] = list(world.queue(0))
    found["next"] = list(world.queue(3))
    time.sleep(0.2 * (rank == 3))  # a busy rank may take as long as it needs
    world.barrier()
    world.close()
    return found


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    return ranks.call(tmp_path_factory.mktemp("agree"), SIZE, agree)


def test_each_rank_knows_its_place(agreed):
    assert [f["rank"] for f in agreed] == [(r, SIZE, r == 0) for r in range(SIZE)]


def test_gather_gives_every_rank_the_same_values_in_rank_order(agreed):
    expected = [{"rank": r, "text": "ä", "none": None} for r in range(SIZE)]
    assert all(f["gather"] == expected for f in agreed)
    assert all(f["again"] == [[r * 10 + i for r in range(SIZE)] for i in range(3)] for f in agreed)


def test_broadcast_gives_rank_0s_value_and_sum_adds(agreed):
    assert all(f["broadcast"] == [1.5, "main"] for f in agreed)
    assert all(f["sum"] == 15 for f in agreed)


def test_mean_reduces_tensors(agreed):
    assert all(f["mean"] == {"a": 1.5, "b": 1.0} for f in agreed)


def test_the_queue_gives_each_job_once_and_more_to_the_faster(agreed):
    assert sorted(j for f in agreed for j in f["queue"]) == list(range(20))
    assert sorted(j for f in agreed for j in f["next"]) == [0, 1, 2]
    assert all(f["empty"] == [] for f in agreed)
    assert len(agreed[0]["queue"]) < 10


def test_one_process_waits_for_nobody():
    world = World("cpu").join()
    torch.set_num_threads(1)
    assert (world.gather(3), world.broadcast("x"), world.sum(5), world.vote(True).result()) == (
        [3],
        "x",
        5,
        (False, True),
    )
    assert list(world.queue(3)) == [0, 1, 2]
    assert world.mean({"a": torch.tensor(2.0)}) == {"a": 2.0}
    assert world.claim_failure()
    assert not world.failed()
    world.close()


def one_fails(rank):
    world = World("cpu").join()
    begin = time.monotonic()
    if rank == 2:
        time.sleep(0.3)
        claims = [world.claim_failure(), world.claim_failure()]
        world._leave_store()
        return {"claims": claims, "peer": False, "took": 0.0}
    try:
        if rank == 0:
            time.sleep(0.6)
            for _ in world.queue(5):
                pass
        else:
            world.barrier()
        peer = False
    except PeerError:
        peer = True
    took = time.monotonic() - begin
    claims = [world.claim_failure()]
    world._leave_store()  # rank 0 hosts the store here: it goes last
    return {"claims": claims, "peer": peer, "took": took}


def test_when_a_rank_fails_the_others_stop_and_only_the_first_may_report(tmp_path):
    found = ranks.call(tmp_path, SIZE, one_fails)
    assert [c for f in found for c in f["claims"]].count(True) == 1
    assert found[2]["claims"] == [True, False]
    assert [f["peer"] for f in found] == [True, True, False, True]
    assert all(f["took"] < 60 for f in found)


def fault(kind):
    return {
        "user": UserError("it is wrong; mend it"),
        "disk": OSError(errno.ENOSPC, "No space left on device", "/some/file"),
        "bug": KeyError("surprise"),
        "native": RuntimeError("CUDA says no"),
    }[kind]


def program(rank, kind, failing, joins):
    """A program of which some ranks fail, before or after all have joined, while the others wait."""

    def main(argv, joined):
        asked.among_ranks = True
        if rank in failing and not joins:
            raise fault(kind)
        world = World("cpu")
        joined(world)
        if rank in failing:
            raise fault(kind)
        world.barrier()

    run_program(main, [])


@pytest.mark.parametrize(("kind", "status"), [("user", 2), ("disk", 2), ("bug", 1), ("native", 1)])
def test_a_fault_of_one_rank_is_said_once_and_nobody_hangs(tmp_path, kind, status):
    ended = ranks.launch(tmp_path, 3, program, (kind, [1], True)).wait()
    assert ended.codes == [2, status, 2], ended.text
    assert len(ended.errors) == 1
    assert describe(fault(kind)) in ended.errors[0]
    assert "Traceback" not in ended.text
    assert len(ended.err[1].splitlines()) == 1
    found = re.search(r"\(unexpected: please report it with (\S+);", ended.errors[0])
    assert (found is not None) == (kind in ("bug", "native"))
    if found:
        assert "raise fault(kind)" in Path(found[1]).read_text()
        Path(found[1]).unlink()
    assert all("stopped:" in ended.err[r] for r in (0, 2))


def fails_while_meeting(rank, moment):
    """Rank 1 fails at a moment of the meeting while the others go on with it."""

    def fail(*_args, **_options):
        if moment == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise fault("native" if moment.endswith("native") else "user")

    if rank == 1 and moment.startswith("meets"):
        world_module.meet = fail
    elif rank == 1:
        torch.distributed.init_process_group = fail

    def main(argv, joined):
        world = World("cpu", 20)
        joined(world)
        world.barrier()

    run_program(main, [])


@pytest.mark.parametrize("moment", ["meets", "meets native", "forms", "forms native", "killed"])
def test_a_fault_at_any_moment_of_the_meeting_is_said_once_and_nobody_hangs(tmp_path, moment):
    """Those who are forming the group meet it as a broken connection, and say no more than that they stop."""
    ended = ranks.launch(tmp_path, 3, fails_while_meeting, (moment,)).wait()
    assert len(ended.errors) == 1, ended.text
    assert "Traceback" not in ended.text
    assert "frame #" not in ended.text
    if moment == "killed":
        assert ended.codes[1] == -signal.SIGKILL
        assert "error: rank 1" in ended.errors[0]
        assert sum("stopped:" in err for err in ended.err) == 1, ended.text
    else:
        assert "it is wrong" in ended.errors[0] or "CUDA says no" in ended.errors[0]
        assert ["stopped:" in err for err in ended.err] == [True, False, True], ended.text


MOMENTS = {
    "connects": (rendezvous, "_store"),
    "meets": (rendezvous, "_meet"),
    "connects again": (world_module, "second_connection"),
    "compares": (world_module, "identity"),
    "forms": (torch.distributed, "init_process_group"),
}


def before(moment, action):
    """From now on do something first at a moment of the meeting."""
    module, name = MOMENTS[moment]
    inner = getattr(module, name)

    def call(*args, **options):
        action()
        return inner(*args, **options)

    setattr(module, name, call)


def fails_while_another_is_slow(rank, failing, fails, slow):
    """Rank ``failing`` fails at a moment; rank 2 stands still at another while the others learn of it and leave."""

    def fail():
        raise fault("user")

    if rank == failing:
        early = rendezvous.failed_early
        rendezvous.failed_early = lambda: time.sleep(1) or early()  # it is slow to say so
        if fails != "starts":
            before(fails, fail)
    if rank == 2:
        before(slow, lambda: time.sleep(4))

    def main(argv, joined):
        asked.among_ranks = True
        if rank == failing and fails == "starts":
            fail()
        joined(World("cpu", 60))

    run_program(main, [])


@pytest.mark.parametrize(
    ("failing", "fails", "slow"),
    [
        (1, "starts", "connects again"),  # once it waited for ever, for a store that had left with rank 0
        (1, "connects", "connects again"),
        (1, "connects again", "forms"),
        (1, "forms", "forms"),
        (0, "meets", "meets"),
        (0, "compares", "connects again"),
    ],
)
def test_nobody_waits_for_ranks_that_left_the_meeting_while_it_was_slow(tmp_path, failing, fails, slow):
    ended = ranks.launch(tmp_path, 3, fails_while_another_is_slow, (failing, fails, slow)).wait()
    assert ended.codes == [2, 2, 2], ended.text
    assert ended.errors == ["error: it is wrong; mend it"], ended.text
    assert ["stopped:" in err for err in ended.err] == [r != failing for r in range(3)], ended.text


def stops_in_a_gather(rank, who_leaves):
    """Rank 2 is asked to stop as it waits for the others' values; ``who_leaves`` gives none, since it stops before."""
    world = World("cpu")

    def main(argv, joined):
        joined(world)
        if rank == 2:
            asked.note(signal.SIGTERM)
        if rank == 1:
            time.sleep(3)
        if rank == who_leaves:
            while True:
                world.check_stop()
                time.sleep(0.05)
        found = world.gather(rank)
        sys.stdout.write(f"{found}\n")
        world.vote().obey(lambda: None)

    run_program(main, [])


@pytest.mark.parametrize("who_leaves", [None, 0, 1, 2])
def test_all_or_none_end_a_gather_in_which_the_job_is_asked_to_stop(tmp_path, who_leaves):
    """One who left after giving his value would let the others wait for him in the collective that follows."""
    ended = ranks.launch(tmp_path, 3, stops_in_a_gather, (who_leaves,)).wait()
    assert ended.codes == [143] * 3, ended.text
    assert all("all is saved" in err for err in ended.err), ended.text
    assert [out.strip() for out in ended.out] == ["[0, 1, 2]" if who_leaves is None else ""] * 3


class SignalledMeanwhile:
    """A store; while it is asked for the word to stop, this rank itself is asked to stop."""

    def __init__(self):
        self.held = {}

    def check(self, keys):
        heartbeat.asked.note(signal.SIGTERM)
        return keys[0] in self.held

    def set(self, key, value):
        self.held[key] = value


def test_a_signal_that_comes_while_a_rank_looks_for_one_is_passed_on_to_the_others(monkeypatch):
    monkeypatch.setattr(heartbeat, "asked", Asked())
    pulse, store = heartbeat.Pulse.__new__(heartbeat.Pulse), SignalledMeanwhile()
    pulse._store = store
    told = pulse._pass_on(False)
    pulse._pass_on(told)
    assert store.held == {"stop": str(int(signal.SIGTERM))}


@pytest.mark.parametrize("joins", [False, True])
def test_a_fault_that_all_ranks_find_is_said_once(tmp_path, joins):
    ended = ranks.launch(tmp_path, 3, program, ("user", [0, 1, 2], joins)).wait()
    assert ended.codes == [2, 2, 2], ended.text
    assert ended.errors == ["error: it is wrong; mend it"]


def test_a_fault_that_one_host_alone_finds_before_it_joins_is_said(tmp_path):
    ended = ranks.launch(tmp_path, 3, program, ("user", [2], False)).wait_as_torchrun()
    assert ended.codes[2] == 2
    assert ended.errors == ["error: it is wrong; mend it"]
    assert all("stopped:" in ended.err[r] for r in (0, 1))


def finished(rank):
    def main(argv, joined):
        world = World("cpu")
        joined(world)
        torch.distributed.all_reduce(torch.ones(3))

    run_program(main, [])


def test_ranks_that_are_done_leave_with_0_though_rank_0_hosts_the_store(tmp_path):
    for i in range(3):
        ended = ranks.launch(tmp_path / str(i), SIZE, finished, ()).wait()
        assert ended.codes == [0] * SIZE, ended.text
        assert not any(ended.err)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "check that the disk is still mounted"),
        (errno.ENOTDIR, "fix this"),
    ],
)
def test_a_fault_of_the_system_is_one_line_with_file_and_remedy(number, says):
    text = describe(OSError(number, os.strerror(number), "/a/b"))
    assert text.startswith(f"/a/b: {os.strerror(number)}; ")
    assert says in text


def test_a_file_that_a_library_names_in_bytes_is_named_as_any_other():
    assert describe(OSError(errno.EIO, "gone", b"/a/b")).startswith("/a/b: gone; ")


def test_a_gpu_without_enough_memory_is_a_fault_that_the_user_can_mend():
    fault = explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), World("cpu"))
    assert isinstance(fault, UserError)
    assert "rank 0's GPU has not enough memory for step start; " in str(fault)
    other = RuntimeError("something else")
    assert explained(other, None) is other


def test_a_message_of_several_lines_becomes_one():
    assert describe(RuntimeError("one\n  two\n")) == "one two"
    assert describe(MemoryError()) == "MemoryError"


def test_cuda_that_is_not_there_is_a_fault_of_the_user():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(UserError, match="--device cpu"):
        World("cuda")


def test_threads_are_a_share_of_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    threads = [World("cpu").threads]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    threads.append(World("cpu").threads)
    torch.set_num_threads(1)
    assert threads == [cores, max(1, cores // 64)]


def test_a_user_may_ask_for_fewer_threads_but_what_torchrun_sets_is_not_asking(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = World("cpu").threads
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    under_torchrun = World("cpu").threads
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("OMP_NUM_THREADS", "²")  # a digit, but not a number
    assert World("cpu").threads == under_torchrun
    torch.set_num_threads(1)
    assert (alone, under_torchrun) == (1, len(os.sched_getaffinity(0)))


def tf32():
    """Whether float32 products, and float32 convolutions, may be rounded to TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_float32_means_float32_for_all_who_form_a_world():
    allow_tf32(True)
    assert tf32() == (True, True)
    World("cpu")
    torch.set_num_threads(1)
    assert tf32() == (False, False)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", ["tf32", "float32", "bf16", "fp16"])
def test_tf32_is_used_where_it_is_asked_for(precision):
    world = World("cpu")
    torch.set_num_threads(1)
    assert agreed_precision(Config(precision=precision), world) == precision
    found = tf32()
    allow_tf32(False)
    assert found == (precision == "tf32",) * 2


def comes_late(rank):
    if rank == 1:
        time.sleep(3)
        return

    def main(argv, joined):
        joined(World("cpu", timeout=1))

    run_program(main, [])


def test_a_rank_that_never_comes_ends_the_others(tmp_path):
    ended = ranks.launch(tmp_path, 3, comes_late, ()).wait()
    assert [ended.codes[r] for r in (0, 2)] == [2, 2], ended.text
    assert len(ended.errors) == 1, ended.text
    assert "3 ranks did not connect at 127.0.0.1:" in ended.errors[0]
    assert "within 1 s; check that all are running, or raise --timeout" in ended.errors[0]


def test_a_silence_is_counted_in_the_time_of_who_listens():
    watch = Watch([1, 2], step=2.0)
    assert watch.look({1: b"a", 2: None}, 1.0) == {1: 0.0, 2: 1.0}
    assert watch.look({1: b"a", 2: b"x"}, 1.0) == {1: 1.0, 2: 0.0}
    assert watch.look({1: b"a", 2: b"x"}, 500.0) == {1: 3.0, 2: 2.0}  # it was the listener who slept
    assert watch.look({1: b"b", 2: b"x"}, 1.0) == {1: 0.0, 2: 3.0}


def listens(rank):
    """Addresses that this rank's own sockets listen on, and not the store's, which torchrun hosts elsewhere."""
    before = listening()
    world = World("cpu").join()
    world.mean({"a": torch.tensor(1.0)})
    found = listening()
    world.close()
    return {"all": sorted(found), "new": sorted(found - before if rank else set())}


def listening():
    """Hexadecimal addresses that this process listens on."""
    inodes = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(path))
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def test_ranks_of_one_host_listen_on_loopback_alone(tmp_path):
    found = ranks.call(tmp_path, 2, listens)
    assert set(found[1]["new"]) <= {"0100007F", "00000000000000000000000001000000"}
    assert found[1]["new"], found


def waits(rank, folder, handler):
    def main(argv, joined):
        if handler:  # as Ray does
            signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(7))
        (folder / "there").touch()
        time.sleep(600)

    run_program(main, [])


@pytest.mark.parametrize(("handler", "status"), [(False, 143), (True, 7)], ids=["", "a library has its own handler"])
def test_a_signal_before_there_is_anything_to_save_ends_at_once(tmp_path, handler, status):
    job = ranks.launch(tmp_path, 1, waits, (tmp_path, handler))
    job.until((tmp_path / "there").exists)
    job.send(signal.SIGTERM)
    ended = job.wait(300)  # its main would sleep for twice as long
    assert ended.codes == [status], ended.text
    assert ("stopped: rank 0, by SIGTERM; nothing was started" in ended.err[0]) == (not handler)


def some_do(rank):
    """Ranks 1 and 3 of four do something alone, twice; the others wait."""
    world = World("cpu").join()
    part, found = world.part([1, 3]), {}
    if part.rank >= 0:
        time.sleep(0.3)
        found = {
            "place": (part.rank, part.size, part.is_main),
            "gather": [part.gather(rank * 10 + i) for i in range(2)],
            "mean": part.mean({"a": torch.tensor(float(rank))}),
            "vote": list(part.vote(save=rank == 1).result()),
            "queue": list(part.queue(6)),
        }
    found["waited"] = world.gather(rank)
    again = world.part([0, 1, 2])
    found["again"] = again.gather(rank) if again.rank >= 0 else []
    total = world.total(torch.full((2,), 2.0**rank, dtype=torch.float64))
    found["total"] = total.tolist() if rank == 0 else []
    world.close()
    return found


def test_some_ranks_are_a_world_of_their_own_and_the_others_wait(tmp_path):
    found = ranks.call(tmp_path, 4, some_do)
    assert [f.get("place") for f in found] == [None, (0, 2, True), None, (1, 2, False)]
    for f in (found[1], found[3]):
        assert f["gather"] == [[10, 30], [11, 31]]
        assert (f["mean"], f["vote"]) == ({"a": 2.0}, [False, True])
    assert sorted(found[1]["queue"] + found[3]["queue"]) == list(range(6))
    assert all(f["waited"] == [0, 1, 2, 3] for f in found)
    assert [f["again"] for f in found] == [[0, 1, 2]] * 3 + [[]]
    assert found[0]["total"] == [15.0, 15.0]
