"""Sets what Ray reads from the environment when it is imported. Whoever reaches Ray's ports can run code, so it asks for a token."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def prepare(address: str | None) -> None:
    """Set what the user has not set. Ray then asks for a token; a local one has a new token, and listens only on loopback."""
    wanted = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # the proposer itself never runs ahead of the room there is
        "RAY_AIR_NEW_OUTPUT": "0",  # verbose=0 is quiet only then
    }
    if address is None:
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux too, this alone makes Ray bind to 127.0.0.1
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = python_path()


def python_path() -> str:
    """Return PYTHONPATH with this program first, so that Ray's workers import the same code."""
    rest = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT)]
    return os.pathsep.join([str(ROOT), *rest])


def token_is_known() -> bool:
    """Whether Ray will find a token where it looks for one, or needs none."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")).exists()
