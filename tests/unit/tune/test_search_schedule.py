"""What the search does with what trials report, without a Ray that runs: who is stopped, what is written, what the page says."""

import dataclasses
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import stores

pytest.importorskip("ray")
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from gdd_dist.config.settings import Config, Gan, Loader, Matching
from sharding.errors import UserError
from sharding.manifest import Manifest
from tune import board, cluster, final, gang, page, space
from tune.cluster import Node
from tune.driver import damaged, left, write_best
from tune.final import Gain
from tune.gang import Job
from tune.options import Options, Search
from tune.proposals import Proposals
from tune.record import DEFAULTS, Outcome, Record, best_of
from tune.schedule import Asha, Keeper, Proposer

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


def a_trial(name, **more):
    return SimpleNamespace(trial_id=f"id-{name}", config={"id": name, "settings": {}}, **more)


def measured(step, val, **more):
    return {
        "step": step,
        "val": val,
        "stderr": 0.5,
        "gap": 1.0,
        "lower": val - 0.5,
        "seconds": 2.0,
        "host": "h#1",
        **more,
    }


def a_keeper(record, until=float("inf")):
    return Keeper(record, until, lambda: None)


def told(asha, name, *results):
    """What the scheduler answers to a trial's reports."""
    trial = a_trial(name)
    asha.on_trial_add(None, trial)
    return [asha.on_trial_result(None, trial, r) for r in results]


def test_asha_stops_who_lags_behind_but_never_the_defaults():
    asha = Asha("val", grace=4, steps=12)
    assert told(asha, "001", measured(0, 10), measured(4, 80)) == [CONTINUE, CONTINUE]
    assert told(asha, "002", measured(0, 10), measured(4, 70)) == [CONTINUE, STOP]
    assert told(asha, "003", measured(0, 10), measured(4, 90)) == [CONTINUE, CONTINUE]
    assert told(asha, DEFAULTS, measured(0, 10), measured(4, 1)) == [CONTINUE, CONTINUE]
    assert told(asha, "004", measured(0, 1)) == [CONTINUE]  # nobody is stopped before the first interval


def test_asha_remembers_what_earlier_invocations_measured(tmp_path):
    record = Record(tmp_path)
    for name, val in (("000", 50.0), ("001", 80.0), ("002", 90.0)):
        record.propose(name, {})
        record.report(name, measured(4, val))
    asha = Asha("lower", grace=4, steps=12)
    asha.replay(record)
    assert told(asha, "003", measured(4, 60)) == [STOP]
    assert told(asha, "004", measured(4, 95)) == [CONTINUE]


@pytest.fixture
def a_record(tmp_path):
    """A search of five trials: two finished, one stopped, one diverged, one still open."""
    record = Record(tmp_path)
    keeper = a_keeper(record)
    results = {
        "000": [measured(0, 50), measured(4, 60), measured(8, 60, kept=4, status="finished", fingerprint="f0")],
        "001": [measured(0, 50), measured(4, 70), measured(8, 70, kept=4, status="finished", fingerprint="f1")],
        "002": [measured(0, 50), measured(4, 40)],
        "003": [measured(0, 50), {"status": "diverged", "reason": "not finite", "seconds": 1.0, "host": "h#1"}],
        "004": [measured(0, 50)],
    }
    for n, (name, lines) in enumerate(results.items()):
        settings = {} if name == DEFAULTS else {"matching.temperature": 1.0 + n, "matching.lambda_adv": 0.0}
        record.propose(name, settings)
        trial = a_trial(name)
        trial.config["settings"] = settings
        for line in lines:
            keeper.on_trial_result(0, [], trial, line)
        if name != "004":
            trial.last_result = lines[-1]
            keeper.on_trial_complete(0, [], trial)
    return record


def a_search(record, **options):
    config = Config(matching=Matching(steps=8, interval=4))
    return Search(record.out, Options(trials=5, **options), config, "digits")


def test_the_keeper_writes_down_how_each_trial_ended(a_record):
    found = a_record.outcomes()
    assert {name: o.status for name, o in found.items()} == {
        "000": "finished",
        "001": "finished",
        "002": "stopped",
        "003": "diverged",
    }
    one = found["001"]
    assert (one.val, one.kept, one.steps, one.seconds, one.fingerprint) == (70, 4, 8, 6.0, "f1")
    assert one.hosts == ("h#1",)
    assert (found["002"].val, found["002"].steps, found["002"].fingerprint) == (40, 4, None)
    assert (found["003"].val, found["003"].reason) == (None, "not finite")
    assert best_of(a_record, "val").id == "001"


def test_a_trial_that_is_lost_too_often_is_recorded(a_record):
    trial = a_trial("004", num_failures=4, get_error=lambda: "the actor died\n because of x")
    a_keeper(a_record).on_trial_error(0, [], trial)
    assert a_record.outcomes()["004"].status == "failed"
    assert "lost 4 times: the actor died because of x" in a_record.outcomes()["004"].reason


def test_a_trial_that_ran_out_of_time_is_left_for_resume(a_record):
    keeper = a_keeper(a_record, until=0.0)
    keeper.on_trial_complete(0, [], a_trial("004", last_result=measured(0, 50)))
    assert "004" not in a_record.outcomes()
    assert left(a_search(a_record, final_seeds=0), a_record)


def test_open_trials_come_first_then_new_ones_as_far_as_there_is_room(a_record):
    room = [2]
    proposals = Proposals(space.SPACE, "random", Config())
    proposer = Proposer(a_record, proposals, 7, "val", lambda: room[0], ["004"])
    first, second = proposer.suggest("a"), proposer.suggest("b")
    assert (first["id"], first["settings"]) == ("004", {"matching.temperature": 5.0, "matching.lambda_adv": 0.0})
    assert second["id"] == "005"
    assert a_record.proposed()["005"] == second["settings"]
    assert proposer.suggest("c") is None
    proposer.on_trial_complete("a", measured(8, 60, status="finished"))
    assert proposer.suggest("c")["id"] == "006"
    room[0] = 9
    assert proposer.suggest("d") == Searcher.FINISHED


def gain(**more):
    values = {
        "trial": "001",
        "seeds": (1, 2, 3),
        "best": (91.0, 93.0, 92.0),
        "defaults": (90.0, 91.0, 92.0),
        "gan": (88.0,) * 3,
    }
    row = {"student": "convnet", "protocol": "regenerate", "labels": "hard", "ipc": 1, "optimizer_steps": 400}
    return Gain(**{**values, "row": row, **more})


def test_the_gain_is_paired_by_seed_and_has_its_error():
    assert gain().difference.mean == pytest.approx(1.0)
    assert gain().difference.stderr == pytest.approx(1.0 / np.sqrt(3))
    assert gain(seeds=(1,), best=(91.0,), defaults=(90.0,), gan=(88.0,)).difference.stderr is None


def test_the_page_says_the_gain_whatever_it_is(a_record, capsys):
    search = a_search(a_record)
    best = best_of(a_record, "val")
    (a_record.out / "trials" / "001" / "config.yaml").write_text("precision: bf16\n")
    write_best(search, best, "s3://bucket/set")
    text = (a_record.out / "best.yaml").read_text()
    assert "precision: bf16\n" in text
    assert "data: s3://bucket/set\n" in text
    page.write(search, a_record, best, gain(best=(89.0, 90.0, 91.0)))
    text = (a_record.out / "search.md").read_text()
    assert "gain over the defaults -1.00 ± 0.00 points" in text
    assert "| 001 * | finished | 70.00 |" in text
    assert "not finite" in text
    assert "| mean | 90.00 | 91.00 | 88.00 | -1.00 ± 0.00 |" in text
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("next: ")).endswith(f"--config {a_record.out}/best.yaml")
    assert (a_record.out / "search.png").stat().st_size > 10_000
    defaults = dataclasses.replace(best, id=DEFAULTS)
    assert "gained nothing" in page.gained(search, a_record, defaults, gain())


def test_what_was_saved_is_counted(a_record):
    (a_record.out / "shared.json").write_text(json.dumps({"steps": {"gan": {"seconds": 900.0, "ranks": 2}}}))
    text = page.cost(a_search(a_record), a_record, list(a_record.outcomes().values()))
    assert "| shards, teachers, logits, GAN, once | 0.500 |" in text
    assert "| saved by reuse | 1.500 |" in text  # four trials, one of which would have had to compute them anyway
    assert "| 1 trial stopped" in text


def test_the_hparams_page_needs_no_second_look(a_record):
    writer = board.Writer(a_record, space.SPACE, Config())
    writer.setup()
    writer.setup()  # as --resume does
    for name in ("000", "001", "002"):
        assert len(list((a_record.out / "tensorboard" / name).iterdir())) == 2
    assert not (a_record.out / "tensorboard" / "003").exists()


def test_retraining_changes_seeds_and_rows_alone(tmp_path):
    config = final.config_of(Config(seed=7), tmp_path, "best", {"matching.temperature": 3.0}, 2)
    assert (config.matching.seed, config.report.seed, config.matching.temperature) == (9, 9, 3.0)
    assert (config.teachers, config.gan, config.logits) == (Config().teachers, Config().gan, Config().logits)
    assert (config.report.protocol, config.report.labels, config.report.baselines) == (
        ("regenerate",),
        ("hard",),
        ("gan",),
    )


def test_torn_state_of_ray_is_told_from_its_form(tmp_path):
    import pickle

    path = tmp_path / "tuner.pkl"
    path.write_bytes(pickle.dumps(list(range(100))))
    assert not damaged(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert damaged(path)
    path = tmp_path / "experiment_state.json"
    path.write_text('{"a": [1, 2]}')
    assert not damaged(path)
    path.write_text('{"a": [1,')
    assert damaged(path)


def test_ranks_know_their_place_and_their_network():
    hosts = [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("a", "10.0.0.1")]
    found = gang.places(hosts, 1234)
    assert [p["RANK"] for p in found] == ["0", "1", "2"]
    assert {p["WORLD_SIZE"] for p in found} == {"3"}
    assert [p["LOCAL_RANK"] for p in found] == ["0", "0", "1"]
    assert [p["LOCAL_WORLD_SIZE"] for p in found] == ["2", "1", "2"]
    assert {(p["MASTER_ADDR"], p["MASTER_PORT"]) for p in found} == {("10.0.0.1", "1234")}
    assert gang.interface("127.0.0.1") == "lo"
    assert gang.interface("203.0.113.77") is None


def test_a_rank_finds_remote_data_by_itself(digits, tmp_path, monkeypatch):
    server = stores.Store()
    try:
        url = server.upload(digits, "digits")
        (place,) = gang.places([("a", "127.0.0.1")], 1234)
        for name, value in {**place, **server.environment}.items():
            monkeypatch.setenv(name, value)  # and takes it back
        config = Config(data=url, out=str(tmp_path / "out"), until="shards", device="cpu")
        config = dataclasses.replace(config, loader=Loader(cache_dir=str(tmp_path / "cache")))
        gang.run_rank(Job(config, "digits", 1, 1.0, 0.0), place)
        steps = json.loads((tmp_path / "out" / "steps.json").read_text())["steps"]
        assert steps["shards"]["fingerprint"] == Manifest.load(digits).fingerprint
        assert steps["shards"]["status"] == "reused"
        assert cluster._unfit(Node("a", "10.0.0.1", 1, 0), UserError("cannot fetch it"), tmp_path, url).startswith(
            "node 10.0.0.1 does not see the data (cannot fetch it); give it network access and credentials"
        )
    finally:
        server.close()


def test_the_shared_steps_take_as_many_ranks_as_their_batches_allow():
    config = Config(gan=Gan(batch=48), matching=Matching(batch=64, group=8))
    assert [gang.with_ranks(config, n) for n in (1, 3, 7, 100)] == [1, 2, 4, 8]
    assert isinstance(Outcome("000", "finished", {}).value("val"), float)


def test_no_more_trials_at_a_time_than_asked_for_and_than_fit(monkeypatch):
    monkeypatch.setattr(cluster, "nodes", lambda: [Node("a", "10.0.0.1", 4, 0), Node("b", "10.0.0.2", 3, 0)])
    assert cluster.room(Options()) == 7
    assert cluster.room(Options(max_concurrent=2)) == 2
    assert cluster.room(Options(max_concurrent=9)) == 7
    assert cluster.room(Options(cpus_per_trial=2, ranks_per_trial=2)) == 1
    assert cluster.room(Options(gpus_per_trial=1)) == 0


def test_a_cluster_that_has_come_to_hold_too_little_says_so_once_each_time(monkeypatch, capsys):
    there = [Node("a", "10.0.0.1", 1, 0), Node("b", "10.0.0.2", 1, 0)]
    monkeypatch.setattr(cluster, "nodes", lambda: there)
    shrunk = cluster.Shrunk(Options(ranks_per_trial=2), 2)
    shrunk()
    assert not capsys.readouterr().err
    for _ in range(2):
        lost = there.pop()
        shrunk()
        shrunk()
        assert capsys.readouterr().err.count("has room for only 1 of the 2 ranks needed") == 1
        there.append(lost)
        shrunk()
        assert not capsys.readouterr().err


def test_a_cluster_whose_token_is_not_known_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no token for the Ray cluster at auto; start one with `ray start --head`, or"):
        cluster.check_address("auto")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("e" * 32)
    cluster.check_address("auto")
    cluster.check_address(None)
    with pytest.raises(UserError, match="--address nonsense is not the address of a cluster"):
        cluster.check_address("nonsense")


def test_the_next_line_fits_this_host_and_a_path_with_spaces(a_record, monkeypatch):
    out = a_record.out / "my search"
    for ranks, here, expected in ((1, (8, 0), 1), (4, (8, 0), 4), (8, (3, 0), 2), (2, (16, 1), 1), (2, (1, 0), 1)):
        monkeypatch.setattr(cluster, "this_host", lambda here=here: Node("", "this host", *here))
        search = dataclasses.replace(a_search(a_record, ranks_per_trial=ranks), out=out)
        words = shlex.split(page.next_line(search))
        assert words[1] == f"--nproc_per_node={expected}"
        assert words[-1] == f"{out}/best.yaml"


def test_a_place_that_rays_sockets_do_not_fit_is_refused_by_the_name_of_its_variable(monkeypatch, tmp_path):
    long = tmp_path / ("r" * 90)
    long.mkdir()
    for place, says in (
        (long, "is too long for Ray's sockets; set RAY_TMPDIR"),
        (tmp_path / "no", "set RAY_TMPDIR"),
    ):
        monkeypatch.setenv("RAY_TMPDIR", str(place))
        with pytest.raises(UserError, match=says):
            cluster.temporary()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert cluster.temporary() == "/tmp"


def test_when_no_trial_has_ended_no_file_is_named_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="a longer --time-budget") as e:
        best_of(Record(tmp_path), "val")
    assert "trials.jsonl" not in str(e.value)
