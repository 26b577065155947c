"""The program that checks whether this machine can run the others, and how to fix what fails: python -m gdd_dist.doctor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from gdd_dist.health.finding import FAIL, OK, WARN, Finding
from gdd_dist.runtime.arguments import Parser
from gdd_dist.runtime.process_identity import place
from gdd_dist.runtime.run_program import run_program
from gdd_dist.runtime.versions import versions

if TYPE_CHECKING:  # parsing or refusing a command line must not wait for torch
    from gdd_dist.runtime.world import World

WIDTH = 110


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        allow_abbrev=False,
        prog="python -m gdd_dist.doctor",
        example="python -m gdd_dist.doctor --out runs --data data/mine",
        description="Check versions, devices, backends, compiler, DeepSpeed, Ray, disks, ports and speed, with a fix for each fault. "
        "Under torchrun on several nodes: check that all of them see the same --out and have the same versions.",
    )
    p.add_argument("--out", default="runs", metavar="DIR", help="where runs will be written (default: runs)")
    p.add_argument("--data", metavar="DIR", help="a data set to check, too")
    text = "also build DeepSpeed's operations (minutes, once) and start Ray"
    p.add_argument("--deep", action="store_true", help=text)
    p.add_argument("--json", action="store_true", help="print the findings as JSON")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: Sequence[str], joined: Callable[[World], None]) -> None:
    """Print the findings; raises SystemExit(1) if any check failed."""
    arguments = parser().parse_args(argv)
    if place()[1] > 1:
        from gdd_dist.runtime.world import World

        world = World("cpu", 60)
        joined(world)
        found = together(world, Path(arguments.out))
        shown = world.is_main
    else:
        found, shown = list(_watched(arguments)), True
    if shown:
        text = json.dumps([dataclasses.asdict(f) for f in found], indent=1) if arguments.json else page(found)
        sys.stdout.write(f"{text}\n")
    if any(f.state == FAIL for f in found):
        raise SystemExit(1)


def _watched(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Yield all findings; a terminal also shows the name of the latest one."""
    hidden, form = not sys.stderr.isatty(), "{desc} {postfix} {elapsed}"
    bar = tqdm(examine(arguments), desc="doctor", bar_format=form, disable=hidden)
    for finding in bar:
        bar.set_postfix_str(finding.name)
        yield finding


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Yield the findings of all checks of this machine, the fast checks first."""
    from gdd_dist.health import checks, isolated_checks  # load torch

    yield checks.python()
    yield from checks.packages()
    yield checks.torch_pair()
    yield checks.devices()
    yield checks.disk(Path(arguments.out))
    yield checks.disk(Path(tempfile.gettempdir()), "temporary")
    yield from checks.ports()
    yield checks.host_name()
    if arguments.data:
        yield checks.data_set(Path(arguments.data))
    yield checks.descriptors()
    yield checks.jpeg_speed()
    yield checks.torch_speed()
    yield isolated_checks.backends()
    yield isolated_checks.compiler()
    yield isolated_checks.deepspeed(arguments.deep)
    yield isolated_checks.ray(arguments.deep)


def page(found: Sequence[Finding]) -> str:
    """Return the findings and their summary as text for a terminal."""
    wide, lines = max(len(f.name) for f in found), list[str]()
    indent = " " * (wide + 8)
    for f in found:
        lines += textwrap.wrap(f"{f.state:4}  {f.name:{wide}}  {f.detail}", WIDTH, subsequent_indent=indent)
        if f.fix:
            lines += textwrap.wrap(f"→ {f.fix}", WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ")
    failed, warned = (sum(f.state == state for f in found) for state in (FAIL, WARN))
    if failed:
        end = f"{failed} of {len(found)} checks failed: fix those first"
    elif warned:
        end = f"ready; {warned} optional part{'s are' if warned > 1 else ' is'} missing or limited"
    else:
        end = "ready"
    return "\n".join([*lines, "", end])


def together(world: World, out: Path) -> list[Finding]:
    """Return the findings that need several ranks. All ranks call it, and get the same findings."""
    token = world.broadcast(uuid.uuid4().hex)
    mark = out / f".doctor-{token}-{world.rank}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(str(world.rank))
        fault = ""
    except OSError as e:
        fault = f"{e.strerror or e}"
    faults = world.gather(fault)
    missing = [r for r in range(world.size) if not (out / f".doctor-{token}-{r}").exists()]
    unseen = world.gather(missing)
    mark.unlink(missing_ok=True)
    return [_shared(out, faults, unseen), _same_versions(world.gather(versions()))]


def _shared(out: Path, faults: Sequence[str], unseen: Sequence[Sequence[int]]) -> Finding:
    for rank, reason in enumerate(faults):
        if reason:
            detail = f"rank {rank} cannot write {out}: {reason.lower()}"
            return Finding("shared disk", FAIL, detail, f"make {out} writable on every node")
    for rank, others in enumerate(unseen):
        if others:
            detail = f"rank {rank} does not see the file that rank {others[0]} wrote in {out}"
            fix = "mount one disk at the same path on all nodes (NFS, Lustre …) and give it as --out"
            return Finding("shared disk", FAIL, detail, fix)
    return Finding("shared disk", OK, f"all {len(faults)} ranks see each other's files in {out}")


def _same_versions(everybody: Sequence[dict[str, str]]) -> Finding:
    for rank, own in enumerate(everybody):
        for name, number in own.items():
            if number != everybody[0].get(name):
                detail = f"rank 0 has {name} {everybody[0].get(name)}, rank {rank} has {number}"
                return Finding("versions", FAIL, detail, "make env on every node, from the same checkout")
    return Finding("versions", OK, ", ".join(f"{name} {number}" for name, number in everybody[0].items()))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
