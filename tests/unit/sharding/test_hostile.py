"""No archive, however made, crashes, hangs, fills the memory or runs anything; each fault is one line with shard and key."""

import io
import os
import random
import signal
import stat
import struct
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import HOSTILE, build_it, image, measured, samples, tar

from sharding.containers import open_files
from sharding.errors import UserError
from sharding.foreign import TarSet
from sharding.foreign import samples as listed
from sharding.images import inspect
from sharding.shards import decode

CASES, MORE = 1500, 20_000
"""Of each of the two fuzz tests: in `make test`, and in `make test-all`."""
MEGABYTES = 64


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_with_shard_and_key_within_bounded_memory(tmp_path, name):
    make, message = HOSTILE[name]
    said, megabytes = measured(make, tmp_path)
    assert "hostile.tar" in said
    with pytest.raises(UserError, match=message):
        raise UserError(said)
    assert megabytes < MEGABYTES, f"{megabytes} MB"


@pytest.mark.parametrize(
    "text", ["pipe:cat x.tar", "PIPE:touch {}", "| touch {}", "! touch {}", "train=pipe:touch {},test=x"]
)
def test_commands_are_refused_and_not_run(tmp_path, text):
    marker = tmp_path / "was-run"
    with pytest.raises(UserError, match="is a command, and commands are never run"):
        raise UserError(build_it(text.format(marker), tmp_path / "dest"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "text", ["http://x/y.tar", "gs://x/y.tar", "scp:host:x.tar", "file:///x.tar", "hf:x", "exec:x"]
)
def test_urls_are_refused(tmp_path, text):
    assert "is a URL; download the tars" in build_it(text, tmp_path / "dest")


def test_members_that_would_be_unpickled_are_never_read(tmp_path, monkeypatch):
    evil = b"cos\nsystem\n(S'false'\ntR."
    files = samples(0, 12) | {f"00011.{ext}": evil for ext in ("pyd", "pickle", "pth", "pkl")}
    path = tar(tmp_path / "x.tar", files)
    read, inner = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: read.append((n, at)) or inner(fd, n, at))
    monkeypatch.setattr("pickle.loads", lambda *_: pytest.fail("unpickled"))
    assert build_it(path, tmp_path / "data") == ""
    with tarfile.open(path) as archive:
        places = [m.offset_data for m in archive if m.name.split(".")[1] in ("pyd", "pickle", "pth", "pkl")]
    assert len(places) == 4
    assert not any(at <= place < at + n for place in places for n, at in read if n < 2**20)


@contextmanager
def no_hang(seconds=60):
    """A case that takes so long has hung, however slow the machine."""

    def late(*_):
        raise TimeoutError("it hangs")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _bases():
    files = samples(0, 2) | {
        "d.x/3.JPEG": image(3),
        "d.x/3.json": b'{"label": 1}',
        "k" * 90 + "/" + "k" * 90 + ".png": image(4, "PNG"),
    }
    files["k" * 90 + "/" + "k" * 90 + ".cls"] = b"2"
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        yield stream.getvalue()


TARS = list(_bases())
IMAGES = [image(5, kind, size, mode) for kind in ("JPEG", "PNG", "WEBP") for size in (8, 40) for mode in ("RGB", "L")]
FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
TOKENS = [
    b"",
    b"\0" * 12,
    b"\xff" * 12,
    b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7,
    b"77777777777",
    b"-1",
    b"../../x.jpg",
    b"/x",
]
TOKENS += [b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"5", b"30 path=a\n", b"9999999 size=1\n"]


def mutated(data: bytes, random: random.Random, whole_headers: bool) -> bytes:
    """A few changes at random; of a tar also to fields of headers, whose checksums are made right again."""
    out = bytearray(data)
    for _ in range(random.randint(1, 5)):
        kind, at = random.randrange(8 if whole_headers else 5), random.randrange(len(out) + 1)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            out[at : at + random.randrange(1, 40)] = random.randbytes(random.randrange(40))
        elif kind == 2:
            del out[at : len(out) if random.random() < 0.5 else at + 512]
        elif kind == 3:
            out[at:at] = out[: random.randrange(1, 1025)]
        elif kind == 4:
            out[at : at + 4] = struct.pack(">I", random.choice([0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF]))
        else:
            _forge(out, random)
    return bytes(out)


def _forge(out: bytearray, random: random.Random) -> None:
    headers = [i for i in range(0, len(out) - 511, 512) if out[i + 257 : i + 262] == b"ustar"]
    if not headers:
        return
    at = random.choice(headers)
    start, length = random.choice(FIELDS)
    token = random.choice([*TOKENS, random.randbytes(random.randrange(1, 13))])[:length]
    out[at + start : at + start + length] = token.ljust(length, b"\0")
    out[at + 148 : at + 156] = b"        "
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])


def fault_of(call, *args) -> str | None:
    """What the user would be told: one line. None where there is no fault."""
    try:
        call(*args)
    except (UserError, ValueError) as error:
        return str(error) or "no reason"
    return None


def read_tar(data: bytes, path: Path) -> str:
    """Read an archive as a build does, images included. Returns how it went."""
    path.write_bytes(data)
    reader, found = TarSet([path]), []
    fault = fault_of(lambda: found.extend(listed(path, 0, reader)))
    assert sum(sample.member.size for sample in found) <= len(data)
    if fault is not None:
        assert fault.startswith(str(path))
        assert "\n" not in fault
        return "refused"
    for sample in found:
        read_image(reader.read(sample.member))
    return "read"


def read_image(data: bytes) -> str:
    """Look at an image and decode it as training does. Returns how it went."""
    seen = fault_of(inspect, data)
    decoded = fault_of(decode, data, np.empty((8, 8, 3), np.uint8))
    assert seen != "no reason" != decoded
    return "read" if seen is None else "refused"


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SEEN: dict[str, list[str]] = {"tar": [], "image": [], "zip": []}


def fuzz_tar(path: Path, data: bytes, random: random.Random) -> None:
    with no_hang():
        SEEN["tar"].append(read_tar(mutated(data, random, True), path))


def fuzz_image(data: bytes, random: random.Random) -> None:
    with no_hang():
        SEEN["image"].append(read_image(mutated(data, random, False)))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzz.tar"


@settings(max_examples=CASES, derandomize=True, **QUIET)
@given(data=st.sampled_from(TARS), seed=st.integers(0, 2**32))
def test_no_mutated_tar_crashes_or_hangs(scratch, data, seed):
    fuzz_tar(scratch, data, random.Random(seed))


def zipped() -> bytes:
    """A zip of files, of a name that is not ASCII, and of a link."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "ü/1.jpg"):
            archive.writestr(name, image(6))
        info = zipfile.ZipInfo("c")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "a")
    return stream.getvalue()


def read_zip(path: Path) -> None:
    files = open_files(str(path), path.parent)
    for member in files.listing()[0]:
        fault_of(files.read, member)


@settings(max_examples=CASES // 2, derandomize=True, **QUIET)
@given(seed=st.integers(0, 2**32))
def test_no_mutated_zip_crashes_or_hangs(scratch, seed):
    scratch.write_bytes(b"PK\x03\x04" + mutated(zipped(), random.Random(seed), False)[4:])
    with no_hang():
        SEEN["zip"].append("read" if fault_of(read_zip, scratch) is None else "refused")


@settings(max_examples=CASES, derandomize=True, **QUIET)
@given(data=st.sampled_from(IMAGES), seed=st.integers(0, 2**32))
def test_no_mutated_image_crashes_or_hangs(data, seed):
    fuzz_image(data, random.Random(seed))


def test_the_fuzz_reaches_both_ends():
    """Some of its cases are read and some refused: else it would test one path alone."""
    for outcomes in SEEN.values():
        assert len(outcomes) >= CASES // 2
        assert {"read", "refused"} <= set(outcomes)


@pytest.mark.slow
@settings(max_examples=MORE, **QUIET)
@given(data=st.sampled_from(TARS), seed=st.integers(0, 2**32))
def test_no_mutated_tar_crashes_or_hangs_longer(scratch, data, seed):
    fuzz_tar(scratch, data, random.Random(seed))


@pytest.mark.slow
@settings(max_examples=MORE, **QUIET)
@given(data=st.sampled_from(IMAGES), seed=st.integers(0, 2**32))
def test_no_mutated_image_crashes_or_hangs_longer(data, seed):
    fuzz_image(data, random.Random(seed))
