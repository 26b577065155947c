"""The program that shows the state of a run, and cleans up its store: python -m gdd_dist.status OUT [--prune [--yes]]."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdd_dist.config.command_line import settings_of
from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS, TABLE
from gdd_dist.pipeline.dataset import manifest_of
from gdd_dist.pipeline.store_users import Directory, plans_of, remove, store_of, unused
from gdd_dist.reporting.tables import aligned, headline
from gdd_dist.runtime.arguments import Parser
from gdd_dist.runtime.locks import Lock
from gdd_dist.runtime.run_program import run_program
from gdd_dist.storage.checkpoint_records import newest_records
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import CHECKPOINTS, CONTENTS, Store, read_records
from sharding.errors import UserError
from sharding.progress import duration
from sharding.redact import redact
from sharding.sizes import size

COLUMNS = ("step", "state", "fingerprint", "size", "finished")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        allow_abbrev=False,
        prog="python -m gdd_dist.status",
        example="python -m gdd_dist.status runs/digits",
        description="Show which steps of a run are finished, running or missing. Changes nothing, except with --prune --yes.",
    )
    p.add_argument("out", metavar="OUT", help="run directory of gdd_dist.train")
    p.add_argument("--prune", action="store_true", help="list directories of its store that no run needs")
    p.add_argument("--yes", action="store_true", help="with --prune: remove them")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: Sequence[str], _joined: object = None) -> None:
    """Print the overview, and prune if requested."""
    arguments = parser().parse_args(argv)
    if arguments.yes and not arguments.prune:
        raise UserError("--yes needs --prune; give both")
    out = Path(arguments.out)
    config = settings_of(out)
    sys.stdout.write(f"{overview(out, config)}\n")
    if arguments.prune:
        sys.stdout.write(f"\n{prune(out, config, arguments.yes)}\n")


def overview(out: Path, config: Config) -> str:
    """Return the text of the whole overview."""
    root = store_of(out, config)
    lines = [f"{out}: {running(out)}", f"data: {data_line(out, config)}", f"store: {root}", ""]
    plan = plan_of(out, root)
    steps, why = STEPS[1 : STEPS.index(config.until) + 1], stale(config, plan, recorded(out, lines))
    rows = [COLUMNS, *(step_line(out, root, step, plan.get(step), why.get(step, "")) for step in steps)]
    lines += aligned(rows, left=len(COLUMNS))
    report = out / "report" / "latest" / "metrics.json"
    if report.exists():
        lines += ["", measured(report), f"report: {report.parent}/report.md"]
    return "\n".join(lines)


def running(out: Path) -> str:
    """Return which process holds OUT, as text."""
    holder = Lock(out / "run.lock").holder()
    if holder is None:
        return "not running"
    return f"running, process {holder['pid']} on {holder['host']} since {holder['since']}"


def data_line(out: Path, config: Config) -> str:
    """Return a description of the data set."""
    data = redact(config.data) if config.data is not None else out / "data"
    try:
        m = manifest_of(out, config)
    except UserError as e:
        return str(e)
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in m.splits.items())
    return f"{data} ({m.name} {m.fingerprint}: {splits})"


def plan_of(out: Path, root: Path) -> Mapping[str, str]:
    """Return STEP → fingerprint; with ``precision: auto`` for the precision with which the run has most finished steps."""
    store = Store(root)

    def there(plan: Mapping[str, str]) -> int:
        return sum(store.finished(s, plan[s]) or store.partial(s, plan[s]).exists() for s in STEPS[1:])

    return max(plans_of(out), key=there, default={})


def measured(report: Path) -> str:
    """Return the headline of a report's metrics, or what is wrong with the file."""
    try:
        return read_json(report, lambda metrics: headline(metrics["results"])).replace("**", "")
    except UserError as e:
        return str(e)


def recorded(out: Path, faults: list[str]) -> dict[str, str]:
    """Return STEP → fingerprint of the steps that the last command on OUT reached; if that is unreadable, {} and a line in ``faults``."""
    try:
        return {step: record["fingerprint"] for step, record in read_records(out).items()}
    except UserError as e:
        faults[-1:-1] = [str(e)]
        return {}


def stale(config: Config, plan: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """Return STEP → why its last result no longer fits the same settings: the data, this version, or an input changed."""
    found = {}
    for step in (name for name in plan if name in TABLE and before.get(name, plan[name]) != plan[name]):
        inputs = [name for name in TABLE[step].shaped_by(config) if before.get(name, plan[name]) != plan[name]]
        found[step] = f"depends on {', '.join(inputs)}" if inputs else "this version computes it differently"
    return found


def step_line(out: Path, root: Path, step: str, fp: str | None, why: str) -> tuple[str, ...]:
    """Return one step's cells. Without a plan (no data set), they describe ``latest``; ``why``: why the step is stale."""
    store = Store(root)
    if fp is None:
        latest = (out / step / "latest").resolve()
        if not (latest / CONTENTS).exists():
            return (step, "unknown: the data set is missing", "", "", "")
        fp = latest.name
    if store.finished(step, fp):
        path = store.path(step, fp)
        finished = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / CONTENTS).stat().st_mtime))
        return (step, "done", fp, size(Directory(path, step, fp).bytes()), finished)
    partial = store.partial(step, fp)
    holder = Lock(root / step / f"{fp}.lock").holder()
    bytes_so_far = size(Directory(partial, step, fp).bytes()) if partial.exists() else ""
    if holder is not None:
        return (step, f"running, {progress(partial)}", fp, bytes_so_far, "")
    if partial.exists():
        return (step, f"interrupted, {progress(partial)}; run the same command again to continue", fp, bytes_so_far, "")
    return (step, f"stale: {why}" if why else "to do", fp, "", "")


def progress(partial: Path) -> str:
    """Return how far a step has come, by its checkpoints or files."""
    newest = newest_records(partial / CHECKPOINTS)
    if not newest:
        files = sum(p.is_file() for p in partial.rglob("*"))
        return f"{files} file{'' if files == 1 else 's'} so far"
    age = time.time() - max(p.stat().st_mtime for p, _ in newest)
    reached = ", ".join(f"{step:,}" for _, step in newest)
    return f"checkpoint at step {reached}, {duration(max(age, 1.0))} ago"


def prune(out: Path, config: Config, yes: bool) -> str:
    """List the directories that no run needs; with ``yes``, remove them."""
    root = store_of(out, config)
    idle, found = unused(root, out)
    gone = f"is listed in {root / 'users'} but is no longer a run: nothing is kept for it"
    unplanned = "its data set is missing; the targets of its latest links and all unfinished steps are kept"
    lines = [*(f"{name} {gone}" for name in found.gone), *(f"{name}: {unplanned}" for name in found.unplanned)]
    if not idle:
        return "\n".join([*lines, f"nothing to prune in {root}"])
    sizes = {d: d.bytes() for d in idle}
    lines += aligned([(str(d.path), size(n)) for d, n in sizes.items()], left=1)
    total = size(sum(sizes.values()))
    many = f"{len(idle)} director{'y' if len(idle) == 1 else 'ies'}"
    if not yes:
        return "\n".join([*lines, f"{many} ({total}) needed by no run; --prune --yes removes them"])
    kept = [d for d in idle if not remove(root, out, d)]
    lines += [f"{d.path} is in use now and is kept" for d in kept]
    removed = size(sum(sizes[d] for d in idle if d not in kept))
    return "\n".join([*lines, f"removed {len(idle) - len(kept)} of {many} ({removed})"])


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
