"""A checkpoint comes back as it was saved, or the one before it does."""

import os

import pytest
import torch

from gdd_dist.storage import checkpoints as module
from gdd_dist.storage.checkpoints import Checkpoints


def state(n):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "history": [{"step": n, "val": 0.1 * n}]}


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    return Checkpoints(tmp_path / "checkpoints", 0, said.append)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_the_newest_comes_back_exactly(checkpoints):
    assert checkpoints.load() is None
    states = {n: state(n) for n in (3, 5, 9)}
    for n, s in states.items():
        checkpoints.save(n, s)
        found = checkpoints.load()
        assert found is not None
        assert found[0] == n
        assert equal(found[1], s)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_are_kept_and_nothing_else(tmp_path, said, keep):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 0, said.append, keep)
    for n in range(5):
        checkpoints.save(n, state(n))
    names = sorted(p.name for p in checkpoints.directory.iterdir())
    assert names == [f"step-{n:09d}{suffix}" for n in range(5 - keep, 5) for suffix in (".json", ".pt")]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(checkpoints, said, damage):
    older = state(1)
    checkpoints.save(1, older)
    checkpoints.save(2, state(2))
    path = checkpoints.directory / "step-000000002.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-7])
    if damage == "remove":
        path.unlink()
    found = checkpoints.load()
    assert found is not None
    assert found[0] == 1
    assert equal(found[1], older)
    assert len(said) == 1
    assert str(path) in said[0]
    assert said[0].endswith("; continuing from an earlier one")
    checkpoints.save(2, state(2))  # going on from there, the same step is saved once more
    assert checkpoints.load()[0] == 2


def test_when_all_are_damaged_the_step_starts_over_and_says_so(checkpoints, said):
    for n in (1, 2):
        checkpoints.save(n, state(n))
        (checkpoints.directory / f"step-00000000{n}.pt").write_bytes(b"")
    assert checkpoints.load() is None
    assert len(said) == 2


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"bytes": 3}', '{"bytes": 3, "sha256": 4}'])
def test_a_damaged_record_costs_its_checkpoint_alone(checkpoints, said, text):
    for n in (1, 2, 3):
        checkpoints.save(n, state(n))
    (checkpoints.directory / "step-000000003.json").write_text(text)
    assert checkpoints.load()[0] == 2
    assert len(said) == 1
    assert "step-000000003" in said[0]


def test_two_damaged_ones_in_a_row_cost_no_good_one(checkpoints, said):
    for n in (1, 2, 3):
        checkpoints.save(n, state(n))
    for n in (2, 3):
        (checkpoints.directory / f"step-00000000{n}.pt").write_bytes(b"")
    assert checkpoints.load()[0] == 1
    checkpoints.save(2, state(2))  # what was damaged and later is gone, the good one is still there
    (checkpoints.directory / "step-000000002.pt").write_bytes(b"")
    assert checkpoints.load()[0] == 1
    assert len(list(checkpoints.directory.glob("step-*.pt"))) == 2


def test_ranks_that_go_on_together_all_load_one_that_each_of_them_found_whole(tmp_path, said):
    """This rank finds all whole; another finds the newest damaged."""
    alone = Checkpoints(tmp_path, 0, said.append)
    for n in (1, 2):
        alone.save(n, state(n))
    others = iter([[[2, 1]], ["/its/view/step-2.pt is damaged"], [""]])
    together = Checkpoints(tmp_path, 0, said.append, among=lambda value: [value, *next(others)])
    assert together.load()[0] == 1
    assert said == ["checkpoint skipped: /its/view/step-2.pt is damaged; continuing from an earlier one"]


class Code:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/gdd-unpickled",))


def test_code_in_a_checkpoint_is_not_run(checkpoints, said):
    """Not even when whoever wrote it gave it the right checksum."""
    checkpoints.save(1, state(1))
    checkpoints.save(2, {"evil": Code()})
    assert checkpoints.load()[0] == 1
    assert not os.path.exists("/tmp/gdd-unpickled")
    assert "is not a valid checkpoint" in said[0]


@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_while_saving_leaves_the_one_before(checkpoints, monkeypatch, call):
    """Before the state is written, and between state and list."""
    older = state(1)
    checkpoints.save(1, older)
    calls = []

    def crash(write):
        def inner(*args):
            calls.append(write)
            if len(calls) == call:
                raise OSError("killed")
            return write(*args)

        return inner

    monkeypatch.setattr(module, "write_atomic", crash(module.write_atomic))
    monkeypatch.setattr(module, "write_json", crash(module.write_json))
    with pytest.raises(OSError, match="killed"):
        checkpoints.save(2, state(2))
    monkeypatch.undo()
    found = checkpoints.load()
    assert found[0] == 1
    assert equal(found[1], older)
    checkpoints.save(3, state(3))
    assert checkpoints.load()[0] == 3


def test_saving_takes_at_most_three_percent_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    write = module.write_atomic

    def slow(*args):
        now[0] += 2.0
        write(*args)

    monkeypatch.setattr(module, "write_atomic", slow)
    checkpoints = Checkpoints(tmp_path, 10)
    assert not checkpoints.due()
    now[0] = 10.0
    assert checkpoints.due()
    checkpoints.save(1, {})
    took = now[0] - 10.0
    saved = now[0]
    while not checkpoints.due():
        now[0] += 0.5
    assert took / (now[0] - saved + took) <= 0.03
    assert Checkpoints(tmp_path, 0).due()
