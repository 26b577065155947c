"""The location of a data set, a directory or a URL, and its manifest, which is all that most programs need."""

import re

from sharding.errors import UserError
from sharding.manifest import Manifest

PATIENCE = 60.0
"""Seconds for which a store may fail before a manifest is treated as missing, unless the settings differ."""
SCHEMES = ("s3", "s3a", "gs", "gcs", "https", "http")


def is_remote(data: str) -> bool:
    """Whether ``data`` is a URL. Raises UserError for an unsupported URL or a command."""
    if data.lower().startswith("pipe:") or data.startswith("|"):
        raise UserError(f"--data {data} is a command, and commands are never run; give a directory or a URL")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", data)
    if "::" in data or (scheme and scheme[1].lower() not in SCHEMES):
        raise UserError(f"--data {data} is not a supported URL; give a directory or a URL of {', '.join(SCHEMES)}")
    return scheme is not None


def read_manifest(data: str, patience: float = PATIENCE) -> Manifest:
    """Return the manifest of a directory or a URL; that of a URL is read once per process, so that it cannot change in a run.

    ``patience``: seconds for which a store may fail.
    """
    if not is_remote(data):
        return Manifest.load(data)
    from gdd_dist.data.remote import remote_manifest  # imported here, because most data sets are local

    return remote_manifest(data, patience)
