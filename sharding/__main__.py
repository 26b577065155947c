"""python -m sharding build | info | verify."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sharding import __version__
from sharding.arguments import Parser
from sharding.errors import UserError
from sharding.interrupts import raise_again
from sharding.layout import summary
from sharding.manifest import Manifest
from sharding.options import DEFAULT_VAL_FRACTION, Options
from sharding.pool import import_webdataset_without_torch
from sharding.redact import redact
from sharding.sizes import parse_size
from sharding.sources import SOURCES
from sharding.tars import shown
from sharding.verify import verify
from sharding.writer import build

UNEXPECTED, USER_ERROR, INTERRUPTED = 1, 2, 130
CLASSES_SHOWN = 20


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; it raises UserError instead of exiting."""
    program = "python -m sharding"
    example = f"{program} build folder:/path/to/images data/mine --image-size 32 --test-fraction 0.1"
    top = Parser(prog=program, example=example, description="Labelled images to tar shards, and checks of them.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="build | info | verify")
    text = "Build a data set. The same command continues an unfinished build."
    make = commands.add_parser("build", help="build a data set", example=example, description=text)
    make.add_argument("source", metavar="SOURCE", help=" | ".join(SOURCES))
    make.add_argument("--shard-size", default="64MB", metavar="SIZE", help="source bytes for each shard (64MB)")
    for flag, kind, metavar, text in (
        ("--workers", int, "N", "worker processes (all cores)"),
        ("--val-fraction", float, "F", f"share of train that becomes val ({DEFAULT_VAL_FRACTION}; digits: 240 images)"),
        ("--test-fraction", float, "F", "share of train that becomes test, if the source has no test"),
        ("--image-size", int, "S", "scale the short side and crop the centre to S×S"),
        ("--seed", int, "N", "seed of the splits and of the order (0)"),
        ("--on-error", str, "stop|skip", "what to do about unreadable images (stop)"),
        ("--layout", str, "splits|classes", "for folder: what directories named train or test are"),
        ("--first-label", int, "N", "for webdataset: the smallest label (0)"),
    ):
        make.add_argument(flag, type=kind, metavar=metavar, help=text)
    make.add_argument("--classes", nargs="+", metavar="N|NAME", help="only the first N classes, or those named")
    text = "values that become black and white in images of more than 8 bits (for 16 bits: 0 65535)"
    make.add_argument("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    info = commands.add_parser("info", help="print what a data set contains", example=f"{program} info data/mine")
    info.add_argument("--json", action="store_true", help="print the manifest")
    check = commands.add_parser(
        "verify", help="check sizes and sha256 of all files", example=f"{program} verify data/mine --deep"
    )
    check.add_argument("--deep", action="store_true", help="decode every image too")
    for command, what in ((make, "directory to write, new or empty"), (info, None), (check, None)):
        command.add_argument("dest", metavar="DEST", type=_path, help=what)
        command.add_argument("--debug", action="store_true", help="print the traceback of an unexpected error")
    return top


def _drop_output() -> None:
    """Discard what the outputs cannot write; otherwise the interpreter tries to write it again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 after an error the user can fix, 1 after any other error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _prepare_streams()
    try:
        options = parser().parse_args(arguments)
        {"build": _build, "info": _info, "verify": _verify}[options.command](options)
        sys.stdout.flush()  # now, while a write error can still be reported
    except UserError as error:
        return _failed(str(error), USER_ERROR)
    except BrokenPipeError:  # the reader of the output has closed it
        _drop_output()
        return UNEXPECTED
    except OSError as error:
        _drop_output()
        where = f" {error.filename}" if error.filename else ""
        line = f"cannot read or write{where} ({error.strerror or error}); free space or check permissions"
        return _failed(line, USER_ERROR)
    except KeyboardInterrupt:
        return _ended("stopped: run the same command again to continue", INTERRUPTED)
    except Exception as error:
        if "--debug" in arguments:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _failed(f"{what} (unexpected: run it again with --debug and report what it prints)", UNEXPECTED)
    return 0


def _failed(line: str, status: int) -> int:
    return _ended(f"error: {redact(line)}", status)


def _ended(line: str, status: int) -> int:
    """Print the last line and return the status, which tells what happened even if nobody can read the line."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        _drop_output()
    return status


def _build(arguments: argparse.Namespace) -> None:
    import_webdataset_without_torch()
    given = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    given["shard_size"] = parse_size(arguments.shard_size)
    chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    options = Options(**chosen)
    built = build(arguments.source, arguments.dest, options, log=_log, bar=sys.stderr.isatty())
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in built.manifest.splits.items())
    skipped = f"; {built.skipped} unreadable images skipped" if built.skipped else ""
    state = "is already there" if built.reused else "is built"
    print(f"{shown(built.manifest.name)} {state} in {arguments.dest}: {splits}{skipped}")
    totals = [sum(counts) for counts in zip(*(s.class_counts for s in built.manifest.splits.values()), strict=True)]
    names = [f"{shown(name)} {n:,}" for name, n in zip(built.manifest.classes, totals, strict=True)]
    more = f", and {len(names) - CLASSES_SHOWN} more; info lists all" if len(names) > CLASSES_SHOWN else ""
    print(f"{len(names)} classes: {', '.join(names[:CLASSES_SHOWN])}{more}")
    if built.manifest.left_out:
        print(f"left out: {summary(built.manifest.left_out)}")


def _info(arguments: argparse.Namespace) -> None:
    manifest = Manifest.load(arguments.dest)
    if arguments.json:
        print(json.dumps(manifest.to_json(), indent=1))
        return
    counts = "1 channel" if manifest.channels == 1 else f"{manifest.channels} channels"
    print(f"{shown(manifest.name)}: {len(manifest.classes)} classes, {manifest.width}×{manifest.height}, {counts}")
    print(f"fingerprint {manifest.fingerprint}")
    print("mean " + " ".join(f"{value:.4f}" for value in manifest.mean), end="; ")
    print("std " + " ".join(f"{value:.4f}" for value in manifest.std))
    print(f"{'split':6} {'images':>10} {'per class':>15} {'shards':>7} {'MB':>9}")
    for name, split in manifest.splits.items():
        per_class = f"{min(split.class_counts)} … {max(split.class_counts)}"
        size = sum(shard.bytes for shard in split.shards) / 1e6
        print(f"{name:6} {split.samples:>10,} {per_class:>15} {len(split.shards):>7} {size:>9.1f}")
    if manifest.left_out:
        print(f"left out: {summary(manifest.left_out)}")
    print(f"{'class':>6} " + " ".join(f"{name:>9}" for name in manifest.splits))
    for label, name in enumerate(manifest.classes):
        counts = " ".join(f"{split.class_counts[label]:>9,}" for split in manifest.splits.values())
        print(f"{label:>6} {counts}  {shown(name)}")


def _path(text: str) -> Path:
    """Return DEST with ``~`` expanded, in case the shell did not expand it."""
    return Path(os.path.expanduser(text))


def _verify(arguments: argparse.Namespace) -> None:
    manifest = verify(arguments.dest, deep=arguments.deep, log=_log, bar=sys.stderr.isatty())
    files = sum(2 * len(split.shards) for split in manifest.splits.values())
    what = "sha256, labels, statistics and every image are right" if arguments.deep else "sizes and sha256 are right"
    print(f"{arguments.dest}: {files} files, {what}")


def _log(line: str) -> None:
    # Printed by tqdm, which keeps a progress bar below the line.
    tqdm.write(line, file=sys.stderr)


def _prepare_streams() -> None:
    # A stream that was closed before the program started is None.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may contain bytes that are not valid UTF-8.
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    raise_again()
    sys.exit(main())
