"""A checkpoint comes back as it was saved, or the one before it does."""

import pytest
import torch

from gdd_dist import checkpoint
from gdd_dist.checkpoint import Checkpoints


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


def test_two_are_kept_and_nothing_else(checkpoints):
    for n in range(5):
        checkpoints.save(n, state(n))
    names = sorted(p.name for p in checkpoints.directory.iterdir())
    assert names == ["latest.json", "step-000000003.pt", "step-000000004.pt"]


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
    checkpoints.save(2, state(2))  # going on from there, the same step is saved once more
    assert checkpoints.load()[0] == 2


def test_when_all_are_damaged_the_step_starts_over_and_says_so(checkpoints, said):
    for n in (1, 2):
        checkpoints.save(n, state(n))
        (checkpoints.directory / f"step-00000000{n}.pt").write_bytes(b"")
    assert checkpoints.load() is None
    assert len(said) == 2


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"checkpoints": [{}]}', '{"checkpoints": 3}'])
def test_a_damaged_list_starts_the_step_over_and_says_so(checkpoints, said, text):
    checkpoints.save(1, state(1))
    (checkpoints.directory / "latest.json").write_text(text)
    assert checkpoints.load() is None
    assert len(said) == 1
    checkpoints.save(2, state(2))
    assert checkpoints.load()[0] == 2


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

    monkeypatch.setattr(checkpoint, "write_atomic", crash(checkpoint.write_atomic))
    monkeypatch.setattr(checkpoint, "write_json", crash(checkpoint.write_json))
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
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    write = checkpoint.write_atomic

    def slow(*args):
        now[0] += 2.0
        write(*args)

    monkeypatch.setattr(checkpoint, "write_atomic", slow)
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
