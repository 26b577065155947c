"""Reads YAML files written by people: UTF-8, each key only once, and `1e-4` is a number."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sharding.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but a number with an exponent needs no decimal point (as in YAML 1.2)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


class _TextLoader(yaml.SafeLoader):
    """A scalar is its text, as on a command line; only an empty one, null and ~ are None."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str, what: str, help: str, text: bool = False) -> dict[Any, Any]:
    """Return the mapping in a file; with ``text``, every value as it is written there.

    Raises UserError if there is none; it calls the file ``what`` and ends with ``help``.
    """
    loader = _TextLoader if text else _Loader
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
        _check_once(yaml.compose(content, Loader=loader), path, {})
        tree = loader(content).get_single_data()
    except OSError as e:
        raise UserError(f"cannot read {what} {path} ({e.strerror}); give a YAML file; {help}") from e
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise UserError(f"{what} {path} is not YAML ({' '.join(str(e).split())}); {help}") from e
    if not isinstance(tree, Mapping):
        raise UserError(f"{what} {path} holds no settings; {help}")
    return dict(tree)


def _check_once(node: yaml.Node | None, path: str, lines: dict[str, int], prefix: str = "") -> None:
    """Refuse a repeated key, of which YAML silently keeps the last. ``lines``: full name of a key → its line."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{name} in {path} is given twice, in lines {lines[name]} and {line}; keep one of them")
        lines[name] = line
        _check_once(value, path, lines, f"{name}.")
