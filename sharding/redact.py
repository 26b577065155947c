"""Hides the secrets of URLs in a text before people see it."""

import re

HIDDEN = "***"
# pathlib removes one of the two slashes of a URL.
_URL = re.compile(
    r"(?P<scheme>\b(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:https?|s3a?|gs|gcs|ftp|az|abfss?|hf):/))"
    r"(?P<user>[^\s/@\"'<>]+@)?(?P<rest>[^\s\"'<>?]*)(?P<query>\?[^\s\"'<>;,)]*)?"
)


def redact(text: str) -> str:
    """Return `text` with the user part and the query of every URL hidden: these hold keys, tokens and signatures."""
    return _URL.sub(_hide, text)


def _hide(found: re.Match[str]) -> str:
    user = f"{HIDDEN}@" if found["user"] else ""
    query = f"?{HIDDEN}" if len(found["query"] or "") > 1 else found["query"] or ""
    return f"{found['scheme']}{user}{found['rest']}{query}"
