"""Numbers of bytes as people write and read them."""

import re
from fractions import Fraction

from sharding.errors import UserError

_UNITS = {"": 1, "B": 1}
_UNITS |= {unit + "B": 1000**power for power, unit in enumerate("KMGT", 1)}
_UNITS |= {unit + "IB": 1024**power for power, unit in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Return bytes from ``64MB`` (10^6), ``64MiB`` (2^20) or a plain number. Raises UserError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"size {text!r} is not a number of bytes; write it as 64MB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def size(n: float) -> str:
    """Return a number of bytes as readable text."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}" if n < 100 * scale else f"{n / scale:.0f} {unit}"
    return f"{n:.0f} B" if n else "0"
