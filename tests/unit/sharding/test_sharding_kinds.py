"""Archives of every kind: read where they can be, else named for what they are, with advice that helps."""

import bz2
import gzip
import io
import stat
import sys
import tarfile
import types
import zipfile

import pytest
from tars import header, tar
from test_sharding_support import encoded, pixels, to_tar, to_zip, write_folder

from sharding import containers
from sharding.errors import UserError
from sharding.kinds import HEAD, is_image
from sharding.links import LOST
from sharding.options import Options
from sharding.sources import open_source
from sharding.writer import build

CUT = Options(workers=1, test_fraction=0.2)
TAIL = bytes(range(256)) * 4
UNREAD = {
    "x.tar.zst": (
        b"\x28\xb5\x2f\xfd",
        r"is compressed \(zstd\); decompress it first: zstd -dc .*x\.tar\.zst > NEW\.tar",
    ),
    "x.tar.lz4": (b"\x04\x22\x4d\x18", r"is compressed \(lz4\); decompress it first: lz4 -dc"),
    "x.7z": (b"7z\xbc\xaf'\x1c\0\4", r"is a 7z archive; unpack it \(7z x .*x\.7z\) and give the directory"),
    "x.rar": (b"Rar!\x1a\7\1\0", r"is a RAR archive; unpack it"),
    "x.cpio": (b"070701", r"is a cpio archive; unpack it"),
    "x.parquet": (b"PAR1", r"is a Parquet file; write its images as files"),
    "x.arrow": (b"ARROW1\0\0", r"is an Arrow file; write its images"),
    "x.h5": (b"\x89HDF\r\n\x1a\n", r"is an HDF5 file; write its images"),
    "x.npy": (b"\x93NUMPY", r"is a NumPy array"),
    "x.jpg": (b"\xff\xd8\xff\xe0", r"is a single image; give the directory"),
    "lfs.tar": (
        b"version https://git-lfs.github.com/spec/v1\n",
        r"is a pointer of Git LFS, not the file itself; fetch the file: git lfs pull",
    ),
    "page.zip": (b"<!DOCTYPE html>", r"is a web page, not an archive"),
    "x.bin": (b"hello", r"is not a complete tar archive or any other supported format; give a directory, a \.tar"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("kinds") / "s", {"a": 6, "b": 6})


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return build(f"folder:{folder}", tmp_path_factory.mktemp("expected") / "d", CUT).manifest


def refused(path, scratch) -> str:
    with pytest.raises(UserError) as caught:
        open_source(f"folder:{path}", scratch)
    assert "download it again" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_whole_but_not_read_is_named(tmp_path, name):
    start, message = UNREAD[name]
    (tmp_path / name).write_bytes(start + TAIL)
    with pytest.raises(UserError, match=message):
        raise UserError(refused(tmp_path / name, tmp_path))
    if name.endswith(".zst"):
        with pytest.raises(UserError, match=r"it is compressed \(zstd\); decompress it first: zstd -dc"):
            open_source(f"webdataset:{tmp_path / name}", tmp_path)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz", "tgz", "zip", "exe.zip"])
def test_all_that_is_read_gives_the_same(tmp_path, folder, expected, suffix):
    path = tmp_path / f"s.{suffix}"
    if suffix.endswith("zip"):
        to_zip(folder, path)
        if suffix != "zip":  # as programs that unpack themselves have it
            path = path.rename(tmp_path / "s.zip")
            path.write_bytes(b"#!/bin/sh\nexit\n" * 50 + path.read_bytes())
    else:
        to_tar(folder, path, mode={"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix[4:]}"))
    assert build(f"folder:{path}", tmp_path / "d", CUT).manifest == expected


def test_zstd_is_read_where_a_library_is(tmp_path, folder, expected, monkeypatch):
    to_tar(folder, tmp_path / "s.tar")
    data = gzip.compress((tmp_path / "s.tar").read_bytes())
    magic = b"\x28\xb5\x2f\xfd"
    (tmp_path / "s.tar.zst").write_bytes(magic + data)
    (tmp_path / "bad.tar.zst").write_bytes(magic + data[:-50])

    def opened(path, mode):
        return gzip.open(io.BytesIO(path.read_bytes()[len(magic) :]), mode)

    monkeypatch.setitem(sys.modules, containers._OPENERS["zstd"][-1], types.SimpleNamespace(open=opened))
    assert build(f"folder:{tmp_path / 's.tar.zst'}", tmp_path / "d", CUT).manifest == expected
    with pytest.raises(UserError, match=r"bad\.tar\.zst is damaged"):
        build(f"folder:{tmp_path / 'bad.tar.zst'}", tmp_path / "e", CUT)


def test_what_is_compressed_and_no_tar_is_named(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"a,b\n" * 400))
    (tmp_path / "x.bz2").write_bytes(bz2.compress(b""))
    for name in ("x.gz", "x.bz2"):
        assert "is compressed, but does not contain a complete tar archive" in refused(tmp_path / name, tmp_path)


def test_a_zip_is_no_webdataset(tmp_path, folder):
    with pytest.raises(UserError, match=r"s\.zip: it is a zip archive; give it as folder:PATH"):
        open_source(f"webdataset:{to_zip(folder, tmp_path / 's.zip')}", tmp_path)


def test_a_name_that_looks_like_magic_is_a_name(tmp_path):
    for name in ("BZh", "Rar!", "7z", "PAR1", "LZIP"):
        files = {f"{name}{c}/{i}.png": encoded(pixels(i)) for c in "ab" for i in range(6)}
        path = tar(tmp_path / f"{name}.tar", files)
        assert open_source(f"folder:{path}", tmp_path).classes == (f"{name}a", f"{name}b")


def test_labels_of_volumes_and_incremental_dumps_are_read(tmp_path, folder, expected):
    data = to_tar(folder, tmp_path / "s.tar", top=".").read_bytes()
    (tmp_path / "s.tar").write_bytes(header("my label", 0, b"V") + header("./a", 600, b"D") + bytes(1024) + data)
    assert build(f"folder:{tmp_path / 's.tar'}", tmp_path / "d", CUT).manifest == expected


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (
            header("a/x.png", 0, tarfile.GNUTYPE_SPARSE),
            r"a/x\.png is a sparse file; write the archive again without --sparse",
        ),
        (header("/data/a/x.png"), r"/data/a/x\.png is an absolute name; write the archive again with relative ones"),
        (header("a/x.png", 0, b"M"), r"a/x\.png began in another volume; unpack it"),
    ],
)
def test_members_of_kinds_that_are_not_read_are_named_with_a_cure(tmp_path, folder, member, message):
    data = to_tar(folder, tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(member + data)
    with pytest.raises(UserError, match=rf"s\.tar cannot be read as it is: {message}"):
        raise UserError(refused(tmp_path / "s.tar", tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flag_bits": 1}, r"a/0\.png is encrypted; unpack it and give the directory"),
        ({"compress_type": 9}, r"a/0\.png is compressed by method 9, which is not supported; unpack it"),
        ({"filename": "/a/0.png"}, r"/a/0\.png is an absolute name"),
        ({"filename": "../a/0.png"}, r"\.\./a/0\.png leads outside"),
    ],
)
def test_zips_that_are_not_read_are_named(tmp_path, change, message):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        info = zipfile.ZipInfo(change.get("filename", "a/0.png"))
        archive.writestr(info, b"x")
        for name, value in change.items():
            setattr(info, name, value)
    with pytest.raises(UserError, match=message):
        raise UserError(refused(tmp_path / "s.zip", tmp_path))


def test_a_name_noted_beside_the_header_is_the_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for i in range(6):
            for name in ("caf#U00e9", "tea"):
                info = zipfile.ZipInfo(f"{name}/{i}.png")
                real = f"café/{i}.png".encode()
                if name != "tea":
                    info.extra = b"up" + (5 + len(real)).to_bytes(2, "little") + bytes(5) + real
                archive.writestr(info, encoded(pixels(i)))
    assert open_source(f"folder:{tmp_path / 's.zip'}", tmp_path).classes == ("café", "tea")


def test_a_damaged_link_in_a_zip_leads_nowhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "b/0.png"):
            archive.writestr(name, encoded(pixels(1)))
        info = zipfile.ZipInfo("c")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, b"target-of-the-link")
    data = (tmp_path / "s.zip").read_bytes()
    (tmp_path / "s.zip").write_bytes(data.replace(b"target-of-the-link", b"target-of-the-kink", 1))
    assert open_source(f"folder:{tmp_path / 's.zip'}", tmp_path).left_out == {LOST: 1}


def test_the_first_bytes_of_every_format_that_is_read_are_known():
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000"):
        assert is_image(encoded(pixels(0), kind)[:HEAD]), kind
    for content in (b"", b"RIFF\0\0\0\0WAVE", b"GIF", b"BM", b"P6\n", b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypmp42"):
        assert not is_image(content)
