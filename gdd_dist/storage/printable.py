"""Turns names of files and classes into text that can be printed, drawn and encoded, whatever their bytes are."""

from __future__ import annotations

import unicodedata


def printable(name: str) -> str:
    """Return ``name`` with bytes that are not UTF-8 and control characters as escapes such as \\udce9 and \\n."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)
