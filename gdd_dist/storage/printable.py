"""Names of files and classes as text that can be printed, drawn and encoded, whatever their bytes are."""

from __future__ import annotations

import unicodedata


def printable(name: str) -> str:
    """``name`` with what is no text in it (bytes that are not UTF-8, control characters) as escapes such as \\udce9, \\n."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)
