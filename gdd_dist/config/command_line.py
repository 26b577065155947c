"""Command line and files → Config: defaults < preset < --config file < command line, in any order on the command line."""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser

from gdd_dist import __version__
from gdd_dist.config.bounds import options, validate, value_of
from gdd_dist.config.presets import PRESETS
from gdd_dist.config.settings import SECTIONS, Config
from gdd_dist.config.yaml_files import read_yaml
from gdd_dist.data.location import PATIENCE, is_remote, read_manifest
from gdd_dist.models import pretrained
from sharding.errors import UserError

_FLAGS = {
    "print_config": "print every setting as YAML and exit",
    "dry_run": "print a table of what would run and what it needs, and exit",
}
_PATHS = ("data", "store", "deepspeed_config", "loader.cache_dir", "teachers.pretrained")
"""Kept as absolute paths, so that OUT/config.yaml means the same from every directory."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: Config
    preset: str
    print_config: bool
    dry_run: bool


def _item_type(hint: Any) -> tuple[Any, bool]:
    """Return the type of a value, and whether a setting takes several values."""
    args = get_args(hint)
    return (args[0], True) if hint is not None and getattr(hint, "__origin__", None) is tuple else (hint, False)


def command_line() -> ArgumentParser:
    """Return the parser with defaults that no preset changed; ``parse`` also applies presets and files."""
    parser = ArgumentParser(
        prog="gdd_dist.train",
        usage="torchrun --nproc_per_node=N -m %(prog)s [--preset NAME] [--data DIR] [--out DIR] [--SECTION.NAME VALUE ...]",
        description="Distil a labelled image data set into a class-conditional generator. Start it with torchrun, or without it as one process.",
        default_env=False,
        version=__version__,
        print_config=None,  # our own option also prints the preset, so that --config can read it back
    )
    text = f"settings to start from: {', '.join(PRESETS)}; default: chosen by the data set"
    parser.add_argument("--preset", default=None, help=text)
    parser.add_argument("--config", default=None, help="YAML file of settings, as --print_config prints them")
    defaults = Config()
    groups: dict[str, Any] = {}
    for name, hint, f in options():
        section = name.rpartition(".")[0]
        if section not in groups:
            doc = (type(getattr(defaults, section)).__doc__ or "").strip() if section else "The whole run."
            groups[section] = parser.add_argument_group(section or "run", doc)
        kind, several = _item_type(hint)
        value = value_of(defaults, name)
        extra: dict[str, Any] = {"nargs": "+", "default": list(value)} if several else {"default": value}
        text = f.metadata["help"] + (f"; one of {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else "")
        groups[section].add_argument(f"--{name}", type=kind, help=text, **extra)
    for flag, text in _FLAGS.items():
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", dest=flag, action="store_true", help=text)
    parser.add_argument("--no-verify", action="store_true", help="do not hash the files that will be read")
    text = "ignored (added by the deepspeed launcher)"
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=text)
    return parser


def _canonical(argv: Sequence[str]) -> list[str]:
    """Accept --deepspeed-config for --deepspeed_config, a bare --debug; refuse unknown settings and suggest the nearest name."""
    spelt = {spelling for flag in (*_FLAGS, "local_rank") for spelling in (flag, flag.replace("_", "-"))}
    known = {name for name, _, _ in options()} | spelt | {"preset", "config", "help", "version", "no-verify"}
    out = []
    for i, token in enumerate(argv):
        if token.startswith("--"):
            name, eq, value = token[2:].partition("=")
            if name.replace("-", "_") in known:
                name = name.replace("-", "_")
            if name not in known:
                raise UserError(_unknown(name, known))
            token = f"--{name}{eq}{value}"
            if name == "debug" and not eq and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
                token += "=true"
        out.append(token)
    return out


_NAMED = ("config", "data", "out", "store")
_ODD = re.compile(r"[-+]?(0[0-9_xob]|[0-9_]+:)\S*")
"""Integers that YAML 1.1 reads to another base: 017 is 15, and 1:30 is 90."""


def _as_written(argv: Sequence[str]) -> list[str]:
    """Keep from the parser, which reads values as YAML, what that would change: ~ in paths, which shells do not expand after ``=``, and
    integers to another base.
    """
    hints = {name: _item_type(hint)[0] for name, hint, _ in options()}
    out, name = list[str](), ""
    for token in argv:
        opened = token.startswith("--")
        value = token
        if opened:
            name, eq, value = token[2:].partition("=")
        if name in _NAMED and not value and (not opened or eq):
            raise UserError(f"--{name} is empty; give a path, or leave it out")
        if name in (*_PATHS, *_NAMED):
            value = os.path.expanduser(value)
        elif int in (hints.get(name), *get_args(hints.get(name))) and _ODD.fullmatch(value):
            raise UserError(f"--{name} {value} is not a decimal number; write it as one, without zeros before it")
        out.append(f"--{name}{eq}{value}" if opened else value)
    return out


def _unknown(name: str, known: set[str], where: str = "") -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    near = near or [k for k in sorted(known) if k.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    return f"unknown setting {name}{where}; {hint}"


def _last(argv: Sequence[str], name: str) -> str | None:
    """Return the last value given for ``--name``."""
    value = None
    for i, token in enumerate(argv):
        if token == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
        elif token.startswith(f"--{name}="):
            value = token.partition("=")[2]
    return value


RETIRED = frozenset({"matching.refit"})
"""Settings of earlier versions. Their runs' config.yaml can still be read; a step that they shaped is stale."""


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if value is None and name in SECTIONS:  # the section is empty
            continue
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _read_file(path: str) -> dict[str, Any]:
    flat = _flatten(read_yaml(path, "--config", "--print_config prints an example", text=True))
    known = {name for name, _, _ in options()} | {"preset"}
    for name in flat:
        if name in SECTIONS:
            raise UserError(f"{name} in {path} is a section; write each of its settings on its own line below it")
        if name not in known | RETIRED:
            raise UserError(_unknown(name, known, f" in {path}"))
    return {name: value for name, value in flat.items() if name in known}


def _as_typed(flat: Mapping[str, Any], path: str) -> list[str]:
    """Return a file's settings as a command line, so that both are parsed and refused in the same way."""
    argv: list[str] = []
    for name, hint, _ in options():
        if name not in flat:
            continue
        value, several = flat[name], _item_type(hint)[1]
        if value is None:
            if type(None) not in get_args(hint):
                raise UserError(f"{name} in {path} is empty; give a value or leave it out")
            continue
        if isinstance(value, list) and not several:
            raise UserError(f"{name} in {path} is a list; give one value")
        values = value if isinstance(value, list) else [value]
        items = [str(v) for v in values]
        argv += [f"--{name}", *items] if several else [f"--{name}={items[0]}"]
    return argv


def _located(path: str) -> str:
    """Return an absolute path; a URL unchanged."""
    return path if not path or is_remote(path) else str(Path(path).absolute())


def _preset_of_data(data: str | None, patience: str | None) -> str:
    if data is None:
        return "digits"
    try:
        manifest = read_manifest(_located(data), min(PATIENCE, float(patience or PATIENCE)))
    except ValueError:  # parsing the settings will report the error
        return "digits"
    if manifest.name in PRESETS:
        return manifest.name
    size = max(manifest.height, manifest.width)
    return "digits" if size <= 16 else "cifar10" if size <= 32 else "tiny-imagenet"


def parse(argv: Sequence[str]) -> Command:
    """Parse and validate a command line. Raises UserError; SystemExit(0) after --help."""
    argv = _as_written(_canonical(argv))
    from_file = _read_file(path) if (path := _last(argv, "config")) else {}
    typed = _as_written(_as_typed(from_file, path or ""))
    given = [*typed, *argv]
    preset = _last(argv, "preset") or str(
        from_file.get("preset") or _preset_of_data(_last(given, "data"), _last(given, "loader.patience"))
    )
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise UserError(f"unknown preset {preset}; {hint}")
    parser = command_line()
    parser.set_defaults(PRESETS[preset])
    if typed:
        _parse_typed(parser, typed, f" in {path}")
    parsed = _parse_typed(parser, [*typed, *argv])
    config = _build(parsed)
    out = config.out or f"runs/{preset}"
    config = dataclasses.replace(config, out=out)
    if out != out.encode("utf-8", "ignore").decode():
        name = os.fsencode(out).decode("utf-8", "backslashreplace")
        what = f"--out {name} is not UTF-8, and TensorBoard cannot write there"
        raise UserError(f"{what}; choose another name, or set PYTHONUTF8=1 where only the locale is not UTF-8")
    validate(config)
    return Command(config, preset, bool(parsed["print_config"]), bool(parsed["dry_run"]))


def settings_of(out: Path, *given: str) -> Config:
    """Return the settings that OUT was last started with, overridden by ``given``. Raises UserError for a directory that is not a run.

    OUT may have been moved since, so its present path replaces the recorded one.
    """
    if not (out / "config.yaml").exists():
        raise UserError(f"{out} is not a run (config.yaml is missing); give the --out of a gdd_dist.train")
    return parse(["--config", str(out / "config.yaml"), "--out", str(out), *given]).config


def _parse_typed(parser: ArgumentParser, argv: Sequence[str], where: str = "") -> dict[str, Any]:
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            namespace = parser.parse_args(list(argv))
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(f"{_plain(stderr.getvalue().rpartition('error:')[2])}{where}; see --help") from None
    return _flatten(namespace.as_dict())


_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors:.* Given value: ", re.S
)


def _plain(reason: str) -> str:
    """Return the parser's ``reason`` in the words of this program."""
    reason = " ".join(re.sub(r"<class '(\w+)'>", r"\1", reason).split()).rstrip(".")
    reason = re.sub(r'Parser key "([^"]+)"', r"--\1", reason)
    reason = _UNION.sub(lambda m: f"Expected a {m[1].replace(', ', ' or a ')}. Got value: ", reason)
    return re.sub(r"\ba (int|float|bool|str|NoneType)\b", lambda m: _TYPES[m[1]], reason)


def _build(parsed: Mapping[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
    for name, hint, _ in options():
        section, _, leaf = name.rpartition(".")
        value = parsed[name]
        if _item_type(hint)[1]:
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        elif name in _PATHS and value is not None:
            value = _located(value)
        values[section][leaf] = value
    sections: dict[str, Any] = {s: type(getattr(Config(), s))(**values[s]) for s in SECTIONS}
    if parsed.get("no_verify"):
        values[""]["verify"] = False
    if (directory := sections["teachers"].pretrained) is not None:  # the pool is its content, one snapshot each
        names = tuple(f.architecture for f in pretrained.files(directory))
        sections["teachers"] = dataclasses.replace(sections["teachers"], architectures=names, seeds=1, snapshots=1)
    return Config(**values[""], **sections)


def to_yaml(config: Config, preset: str) -> str:
    """Return every setting as YAML that --config can read."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # YAML has lists instead of tuples
    return yaml.safe_dump({"preset": preset, **tree}, sort_keys=False)
