"""The whole search, in order: cluster, shared steps, trials, the gain of the best trial, the page."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.tune
import torch
import yaml
from ray.tune.schedulers import FIFOScheduler

from gdd_dist.config import command_line as configuration
from gdd_dist.data.location import is_remote, read_manifest
from gdd_dist.pipeline.preflight import check
from gdd_dist.pipeline.store_users import store_of
from gdd_dist.runtime.locks import Lock, holding, in_use
from gdd_dist.runtime.monitor import say
from sharding.errors import UserError
from sharding.files import write_atomic
from sharding.redact import redact
from sharding.writer import build
from tune import board, cluster, final, gang, page, shared, space, study
from tune.arguments import GRID
from tune.cluster import Node
from tune.gang import Job
from tune.options import FILE, Search, save
from tune.proposals import Proposals
from tune.record import DEFAULTS, FINISHED, Outcome, Record
from tune.schedule import ENDED, Asha, Keeper, Proposer
from tune.trial import trial

MAX_FAILURES = 3
"""How often a trial that loses its process or node is started again."""


def run(search: Search) -> None:
    """Run a whole search, or the rest of one."""
    out = search.out
    if (out / FILE).exists() and not search.resume:
        raise UserError(f"{out} already holds a search; continue it with --resume, or choose another --out")
    record = Record(out.resolve())
    if left(search, record):  # what is refused here leaves no trace
        cluster.check_address(search.options.address)
        if search.options.address is None:
            cluster.temporary()
            cluster.check_resources(search.options, [cluster.this_host()])

    def busy(holder: Mapping[str, Any]) -> None:
        raise in_use(out, holder)

    with holding(Lock(out / "run.lock"), busy):
        data = data_of(search)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check(search.config, read_manifest(data), search.options.ranks_per_trial, device)
        if search.resume:
            _say_what_is_there(search, record)
        if left(search, record):
            with cluster.cluster(search.options.address, search.config.debug) as nodes:
                _compute(search, record, data, nodes)
        best = study.best(search, record)
        write_best(search, best, data)
        page.write(search, record, best, final.load(out, best.id, search.new_seeds))


def data_of(search: Search) -> str:
    """Return the data set as every node finds it: an absolute path, or a URL. Without --data, build the digits in OUT/data."""
    given = search.config.data
    if given is None:
        build("digits", search.out / "data")
        return str((search.out / "data").resolve())
    return given if is_remote(given) else str(Path(given).resolve())


def left(search: Search, record: Record) -> bool:
    """Whether a trial, or the gain of the best one, is still to be computed."""
    ended = record.outcomes()
    if len(ended) < search.options.trials or record.proposed().keys() - ended.keys():
        return True
    return any(o.status == FINISHED for o in ended.values()) and _unread(search, study.best(search, record))


def _unread(search: Search, best: Outcome) -> bool:
    """Whether the best is still to be retrained and read on test."""
    return bool(search.new_seeds) and final.load(search.out, best.id, search.new_seeds) is None


def _compute(search: Search, record: Record, data: str, nodes: list[Node]) -> None:
    """Compute all that needs Ray."""
    o, out = search.options, record.out
    slots = cluster.check_resources(o, nodes)
    cluster.describe(nodes, slots)
    cluster.check_nodes(nodes, out, data)
    save(search)  # what is refused above is no search yet
    gpus = cluster.gpus_of(o, nodes)
    store = str(store_of(out, search.config).resolve())
    config = dataclasses.replace(gang.on_cpu(search.config, gpus), data=data, store=store)
    base = shared.settle_precision(Job(config, search.preset, o.ranks_per_trial, o.cpus_per_trial, gpus))
    alone = dataclasses.replace(base, gpus=float(math.ceil(gpus)))  # trials may share a GPU; NCCL's ranks may not
    one_node = max(n.slots(alone.cpus, alone.gpus) for n in nodes)
    ranks = gang.with_ranks(base.config, max(one_node, o.ranks_per_trial))
    shared.compute(alone, out, ranks, cluster.Shrunk(o, ranks))
    trials(search, record, base)
    best = study.best(search, record)
    if _unread(search, best):
        say(f"search: best is trial {best.id}; it and the defaults are retrained with {o.final_seeds} new seeds")
        final.measure(base, out, best, search.new_seeds)


def trials(search: Search, record: Record, base: Job) -> None:
    """Run the trials that have not ended."""
    o, ended = search.options, record.outcomes()
    if o.algorithm == GRID:  # all are known beforehand
        for n, settings in enumerate(space.grid(search.axes, search.config, o.seeds)):
            if (name := f"{n:03d}") not in record.proposed():
                record.propose(name, settings)
    again = [name for name in record.proposed() if name not in ended]
    missing = max(0, o.trials - len(record.proposed()))
    if not again and not missing:
        return
    proposals = Proposals(search.axes, o.algorithm, search.config)
    for name, settings in {DEFAULTS: {}, **record.proposed()}.items():
        proposals.remember(name, {**space.values(search.axes, search.config), **settings})
        if name in ended:
            proposals.tell(name, ended[name].val if ended[name].status in ENDED else None)
    asha = Asha(o.metric, search.config.matching.interval, longest(search)) if o.scheduler == "asha" else None
    if asha is not None:
        asha.replay(record)
    until = time.monotonic() + o.time_budget if o.time_budget else float("inf")
    keeper = Keeper(record, until, cluster.Shrunk(o, o.ranks_per_trial))
    place = ray.tune.PlacementGroupFactory(base.bundles(), strategy="PACK")
    ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(trial, base=base), place),
        tune_config=ray.tune.TuneConfig(
            num_samples=len(again) + missing,
            search_alg=Proposer(record, proposals, o.trials, o.metric, lambda: cluster.room(o), again),
            scheduler=asha or FIFOScheduler(),
            time_budget_s=o.time_budget,
            trial_dirname_creator=lambda t: str(t.config["id"]),
        ),
        run_config=ray.tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(record.out / "ray"),
            failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[keeper, board.Writer(record, search.columns, search.config)],
            verbose=0,
        ),
    ).fit()


def longest(search: Search) -> int:
    """Return the largest number of steps that a trial may take."""
    steps = [int(v) for axis in search.axes if axis.setting == "matching.steps" for v in axis.ends()]
    return max([search.config.matching.steps, *steps])


def _say_what_is_there(search: Search, record: Record) -> None:
    """Tell the user what --resume continues, and which of Ray's files are damaged, although nothing here reads them."""
    ended, proposed = record.outcomes(), record.proposed()
    open_ = [name for name in proposed if name not in ended and record.reports(name)]
    further = f"; continuing {', '.join(open_)} from their checkpoints" if open_ else ""
    say(f"search: {len(ended)} of {search.options.trials} trials have ended{further}")
    for path in sorted((record.out / "ray").glob("*/*.pkl")) + sorted((record.out / "ray").glob("*/*.json")):
        if damaged(path):
            further = "nothing is lost: the search continues from trials.jsonl and its own checkpoints"
            say(f"search: Ray's {path} is damaged; {further}")


def damaged(path: Path) -> bool:
    """Whether one of Ray's files was cut short, judged by its form alone, because a pickle is never loaded."""
    data = path.read_bytes()
    if data.startswith(b"\x80"):  # a pickle, whatever its name; it ends with the STOP opcode
        return not data.endswith(b".")
    try:
        json.loads(data)
    except ValueError:
        return True
    return False


def write_best(search: Search, best: Outcome, data: str) -> None:
    """Write OUT/best.yaml: the best trial's settings, with absolute paths, and the store that holds what it was made from."""
    out = search.out.resolve()
    ran = yaml.safe_load((out / "trials" / best.id / "config.yaml").read_bytes())
    config = dataclasses.replace(
        space.apply(search.config, best.settings),
        precision=ran["precision"],
        data=data,
        store=str(store_of(out, search.config).resolve()),
        out=str(out / "best"),
        device="cpu" if search.options.gpus_per_trial == 0 else search.config.device,
        until="report",
        debug=False,
    )
    write_atomic(out / "best.yaml", redact(configuration.to_yaml(config, search.preset)).encode())
