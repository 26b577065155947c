"""Image files without the metadata that change no pixel, for files whose metadata are damaged or too long."""

import zlib

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_FILL, _SCAN, _METADATA = 0xFF, 0xDA, (*range(0xE0, 0xF0), 0xFE)
# The segments of a JPEG that say how to turn it and what its channels are: marker → (beginning, least bytes).
_KEPT = {0xE0: (b"JFIF\0", 14), 0xE1: (b"Exif\0\0", 14), 0xEE: (b"Adobe", 12)}


def bare(payload: bytes) -> bytes:
    """Return a PNG or a JPEG with only those metadata that its pixels depend on; other bytes unchanged.

    Kept are the orientation, the transparent colour of a PNG, and what names the colours of a JPEG, where they are whole.
    """
    if payload.startswith(_PNG):
        return _bare_png(payload)
    return _bare_jpeg(payload) if payload.startswith(_JPEG) else payload


def _bare_png(payload: bytes) -> bytes:
    kept, position = [_PNG], len(_PNG)
    while position < len(payload):
        end = position + 12 + int.from_bytes(payload[position : position + 4], "big")
        kind, crc = payload[position + 4 : position + 8], int.from_bytes(payload[end - 4 : end], "big")
        whole = zlib.crc32(payload[position + 4 : end - 4]) == crc
        # Chunks whose kind begins with a capital are needed to decode the pixels.
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and whole):
            kept.append(payload[position:end])
        position = end
    return b"".join(kept)


def _bare_jpeg(payload: bytes) -> bytes:
    kept, position = [_JPEG], len(_JPEG)
    while payload[position : position + 1] == b"\xff" and position + 4 <= len(payload):
        marker, end = payload[position + 1], position + 2 + int.from_bytes(payload[position + 2 : position + 4], "big")
        if marker in (_FILL, _SCAN):
            break
        beginning, least = _KEPT.get(marker, (b"", 2**16))
        content = payload[position + 4 : end]
        whole = content.startswith(beginning) and len(content) >= least
        if whole or marker not in _METADATA:
            kept.append(payload[position:end])
        position = end
    return b"".join([*kept, payload[position:]])
