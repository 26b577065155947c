"""Remote data: every sample right whatever the store does, one download per shard and host, a cache within its limit."""

import functools
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, deque

import hooks
import numpy as np
import pytest
import ranks
import stores
import torch

from gdd_dist.config.command_line import parse
from gdd_dist.data import remote
from gdd_dist.data.images import Images
from gdd_dist.data.location import is_remote, read_manifest
from gdd_dist.data.remote import Cache, mirror_of, open_data
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

SHARDS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits in five shards of train."""
    where = tmp_path_factory.mktemp("data") / "digits"
    build("digits", where, Options(shard_size=600_000, workers=1))
    assert len(Manifest.load(where).splits["train"].shards) == SHARDS
    return where


@pytest.fixture(scope="module")
def store():
    found = stores.Store()
    yield found
    found.close()


@pytest.fixture(scope="module")
def url(store, data):
    return store.upload(data, "digits")


@pytest.fixture
def here(store, monkeypatch):
    """This process is a client of the store, which begins anew."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    store.log.clear()
    store.faults.clear()
    store.delay = 0.0
    remote._manifests.clear()
    open_data.cache_clear()
    return store


def every(data, split="train", **options):
    manifest = Manifest.load(data)
    images = Images(data, manifest, split, resident="none", **options)
    return images.read(np.arange(len(images))).clone(), images.labels


def opened(url, directory, limit="1GB", patience=60.0):
    return open_data(url, Cache.of(str(directory), limit, patience))


def test_a_remote_data_set_reads_as_the_local_one(url, data, here, tmp_path):
    mirror = opened(url, tmp_path)
    assert read_manifest(url) == Manifest.load(mirror) == Manifest.load(data)
    for split in ("train", "val", "test"):
        for found, expected in zip(every(mirror, split, threads=2), every(data, split), strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("fault", [stores.throttled, stores.broken, stores.truncated, stores.flipped])
def test_a_store_that_errs_costs_time_and_no_sample(url, data, here, tmp_path, fault):
    here.faults = {f"00000{i}.tar": deque([fault] * 2) for i in range(SHARDS)}
    mirror = opened(url, tmp_path)
    assert torch.equal(every(mirror)[0], every(data)[0])
    assert not any(here.faults.values())


def test_indexes_and_the_manifest_are_fetched_again_too(url, data, here, tmp_path):
    here.faults = {"manifest.json": deque([stores.broken] * 2), "000000.npy": deque([stores.flipped, stores.truncated])}
    assert torch.equal(every(opened(url, tmp_path))[0], every(data)[0])


def assert_waits(store, url, data, folder, seconds):
    """A store that dies for a while is waited for, and every sample is right."""
    mirror = opened(url, folder)
    begin = time.monotonic()
    store.die_for(seconds)
    assert torch.equal(every(mirror)[0], every(data)[0])
    assert time.monotonic() - begin > seconds - 1


def test_a_store_that_dies_for_ten_seconds_is_waited_for(url, data, here, tmp_path):
    assert_waits(here, url, data, tmp_path, 10)


def test_a_store_that_stays_dead_is_one_error(url, here, tmp_path):
    mirror = opened(url, tmp_path, patience=3.0)
    here.close()
    try:
        with pytest.raises(UserError, match=r"cannot fetch s3://digits/sets/train/00000\d\.tar .*check the store"):
            every(mirror)
    finally:
        here.start()


def test_patience_bounds_the_manifest_and_a_store_that_says_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never answers
        for port in (silent.getsockname()[1], 9):
            begin = time.monotonic()
            with pytest.raises(UserError, match="check the store and the network"):
                parse(["--data", f"http://127.0.0.1:{port}/x", "--loader.patience", "1"])
            assert time.monotonic() - begin < 250  # without the setting it would be 300


def test_another_file_than_the_manifests_is_named_and_never_used(store, data, here, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(data, wrong)
    path = wrong / "train/000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    mirror = opened(store.upload(wrong, "wrong"), tmp_path / "cache")
    with pytest.raises(UserError, match=r"wrong/sets/train/000002\.tar \(its sha256 differs from the manifest\); copy"):
        every(mirror)
    assert not (mirror / "train/000002.tar").exists()


def test_what_is_not_there_is_said_at_once(store, data, here, tmp_path):
    store.upload(tmp_path, "empty")
    with pytest.raises(UserError, match=r"cannot fetch s3://empty/sets/manifest\.json .*check the URL"):
        read_manifest("s3://empty/sets")
    shutil.copytree(data, tmp_path / "part")
    (tmp_path / "part/train/000001.tar").unlink()
    mirror = opened(store.upload(tmp_path / "part", "part"), tmp_path / "cache")
    with pytest.raises(UserError, match=r"part/sets/train/000001\.tar .*copy the whole data set"):
        every(mirror)


def test_the_cache_keeps_within_its_limit_and_what_was_used_last(url, data, here, tmp_path):
    sizes = [info.bytes for info in Manifest.load(data).splits["train"].shards]
    limit = 2 * max(sizes) + 1000
    mirror = opened(url, tmp_path, limit=str(limit))
    images = Images(mirror, Manifest.load(mirror), "train", resident="none")
    starts = np.concatenate([[0], np.cumsum(images.shards.shard_samples)])
    expected = every(data)[0]
    for shard in (0, 1, 2, 1, 3, 4, 0):
        rows = np.arange(starts[shard], starts[shard + 1])
        assert torch.equal(images.read(rows), expected[rows])
        tars = sorted(mirror.rglob("*.tar"))
        assert sum(p.stat().st_size for p in tars) <= limit
        assert mirror / f"train/{shard:06d}.tar" in tars
    assert here.downloads() == {f"/digits/sets/train/00000{i}.tar": 1 + (i == 0) for i in range(SHARDS)}


def test_a_limit_that_holds_no_shard_is_refused(url, here, tmp_path):
    with pytest.raises(UserError, match="--loader.cache_limit is smaller than a shard"):
        opened(url, tmp_path, limit="1kB")


def test_a_later_run_downloads_nothing_and_mends_what_was_altered(url, data, here, tmp_path):
    mirror = opened(url, tmp_path)
    every(mirror)
    here.log.clear()
    open_data.cache_clear()
    assert torch.equal(every(opened(url, tmp_path))[0], every(data)[0])
    assert not here.downloads()
    for name in ("train/000001.tar", "val/000000.npy"):
        content = bytearray((mirror / name).read_bytes())
        content[1000] ^= 1
        (mirror / name).write_bytes(content)
    mine = mirror_of(mirror)
    for split in Manifest.load(data).splits.values():
        for info in split.shards:
            mine.check(info)
    assert torch.equal(every(mirror)[0], every(data)[0])
    assert here.downloads() == {"/digits/sets/train/000001.tar": 1}
    assert torch.equal(every(mirror, "val")[0], every(data, "val")[0])


def read_on_a_host(rank, url, caches, hosts, environment):
    """What a rank of one of several hosts reads, in its order of training: int64 sums of images."""
    size = len(caches)
    os.environ.update(environment, LOCAL_RANK=str(rank % (8 // hosts)), LOCAL_WORLD_SIZE=str(8 // hosts))
    from gdd_dist.data.order import Order

    mirror = opened(url, caches[rank * hosts // 8])
    images = Images(mirror, Manifest.load(mirror), "train", resident="none")
    order = Order(images.shards.shard_samples, 64, 64, 0)
    assert size == hosts
    steps = range(order.steps_per_epoch)
    images.expect(lambda s: order.batch(s, rank, 8), 0, len(steps))
    found = [images.read(order.batch(s, rank, 8)).long().sum((1, 2, 3)).tolist() for s in steps]
    # As in a run, no rank leaves before the others are done: a download that it has begun for them would be begun again.
    (done := caches[0].parent / "done").mkdir(exist_ok=True)
    (done / str(rank)).touch()
    while len(list(done.iterdir())) < 8:
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("hosts", [1, 2])
def test_each_host_downloads_each_shard_that_it_needs_once(url, data, here, tmp_path, hosts):
    here.delay = 0.05
    caches = [tmp_path / f"host-{i}" for i in range(hosts)]
    found = ranks.call(tmp_path / "job", 8, read_on_a_host, url, caches, hosts, here.environment)
    from gdd_dist.data.order import Order

    images, _ = every(data)
    counts = tuple(i.samples for i in Manifest.load(data).splits["train"].shards)
    order = Order(counts, 64, 64, 0)
    sums = images.long().sum((1, 2, 3))
    for step in range(order.steps_per_epoch):
        together = [value for rank in found for value in rank[step]]
        assert together == sums[order.batch(step)].tolist()
    needed: Counter[str] = Counter()
    for host in range(hosts):
        rows = np.concatenate([order.batch(step, host, hosts) for step in range(order.steps_per_epoch)])
        shards = np.unique(np.searchsorted(np.cumsum(counts), rows, side="right")).tolist()
        needed.update(f"/digits/sets/train/00000{shard}.tar" for shard in shards)
    assert here.downloads() == needed


@pytest.mark.parametrize("wrong", ["pipe:cat x", "|cat", "sftp://host/x", "simplecache::s3://a/b", "file:///x"])
def test_other_urls_and_commands_are_refused(wrong):
    with pytest.raises(UserError, match="commands are never run|is not a supported URL; give"):
        is_remote(wrong)


def test_a_run_trains_on_remote_data_as_on_local(url, here, tiny, data, tmp_path):
    argv = [*tiny[2:], "--until", "teachers", "--teachers.seeds", "1"]
    outs = []
    for name, where in (("local", str(data)), ("remote", url)):
        cache = ["--loader.cache_dir", str(tmp_path / "cache"), "--loader.resident", "none"]
        before = functools.partial(hooks.environment, values=here.environment)
        ranks.train(tmp_path / name, ["--data", where, *argv, *cache], 2, before=before)
        (file,) = {p.resolve() for p in (tmp_path / name / "teachers").glob("*/teacher-001.safetensors")}
        outs.append((file.parent.name, ranks.weights(file)))
    assert outs[0] == outs[1]


def test_what_will_be_read_comes_ahead_in_that_order_also_where_half_the_cache_holds_less(url, data, here, tmp_path):
    infos = Manifest.load(data).splits["train"].shards
    mirror = opened(url, tmp_path, limit=str(6 * max(info.bytes for info in infos)))  # ahead: three shards
    images, use = Images(mirror, Manifest.load(mirror), "train", resident="none"), [4, 2, 0, 1, 3]
    starts = np.cumsum([0, *images.shards.shard_samples])
    rows = [np.arange(starts[shard], starts[shard + 1]) for shard in use]
    images.expect(lambda step: rows[step], 0, SHARDS)
    end = time.monotonic() + 60
    while len(here.downloads()) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert set(here.downloads()) == {f"/digits/sets/train/00000{i}.tar" for i in use[:3]}
    expected = every(data)[0]
    for here_rows in rows:
        assert torch.equal(images.read(here_rows), expected[here_rows])
    assert here.downloads() == {f"/digits/sets/train/00000{i}.tar": 1 for i in range(SHARDS)}


def test_a_download_says_how_fast_it_is_and_what_is_left(url, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "LINE_SECONDS", -1.0)
    mirror = mirror_of(opened(url, tmp_path))
    for info in read_manifest(url).splits["train"].shards:
        mirror.ahead(info)
    said, end = "", time.monotonic() + 60
    while " 0 left" not in said and time.monotonic() < end:
        time.sleep(0.02)
        said += capsys.readouterr().err
    assert re.search(r"^download: [\d,]+ of [\d,]+ MB, [\d.]+ MB/s, [\d.]+ (s|min|h|days) left$", said, re.MULTILINE)


@pytest.fixture(params=[stores.Web, stores.Google], scope="module")
def other(request):
    """A store of another kind."""
    found = request.param()
    yield found
    found.close()


@pytest.fixture
def there(other, data, monkeypatch):
    """It holds the data set and begins anew; returns the URL."""
    for name, value in other.environment.items():
        monkeypatch.setenv(name, value)
    other.log.clear()
    other.faults.clear()
    remote._manifests.clear()
    open_data.cache_clear()
    return other.upload(data, "digits")


def test_every_kind_of_store_may_err(there, other, data, tmp_path):
    faults = [stores.throttled, stores.broken, stores.truncated, stores.flipped]
    other.faults = {f"00000{i}.tar": deque([fault]) for i, fault in enumerate(faults)}
    other.faults["manifest.json"] = deque([stores.broken])
    mirror = opened(there, tmp_path)
    images = Images(mirror, Manifest.load(mirror), "train", resident="none")
    images.expect(lambda _: np.arange(len(images)), 0, 1)
    assert torch.equal(images.read(np.arange(len(images))), every(data)[0])
    assert not any(other.faults.values())
    whole = Counter({name: count for name, count in other.downloads().items() if name.endswith("000004.tar")})
    assert list(whole.values()) == [1]


def test_every_kind_of_store_may_die_for_a_while(there, other, data, tmp_path):
    assert_waits(other, there, data, tmp_path, 3)


def test_what_another_store_has_not_or_forbids_is_said_at_once(there, other, tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch .*/manifest\.json .*check the URL"):
        read_manifest(f"{there}/nowhere")
    other.faults = {"manifest.json": deque([stores.forbidden])}
    with pytest.raises(UserError, match=r"cannot fetch .*/manifest\.json .*check the credentials"):
        read_manifest(there)


@pytest.fixture
def secure():
    found = stores.SecureWeb()
    yield found
    found.close()


def test_over_tls_a_process_that_trusts_the_certificate_reads_the_same_through_faults(secure, data, tmp_path):
    url = secure.upload(data, "digits")
    secure.faults = {f"00000{i}.tar": deque([fault]) for i, fault in enumerate([stores.broken, stores.truncated])}
    # In a process of its own: aiohttp reads SSL_CERT_FILE once, when it is imported.
    script = (
        "import sys, hashlib, numpy as np\nfrom gdd_dist.data.images import Images\n"
        "from gdd_dist.data.remote import Cache, open_data\nfrom sharding.manifest import Manifest\n"
        "mirror = open_data(sys.argv[1], Cache.of(sys.argv[2], '1GB', 60.0))\n"
        "images = Images(mirror, Manifest.load(mirror), 'train', resident='none')\n"
        "print(hashlib.sha256(images.read(np.arange(len(images))).numpy().tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, url, str(tmp_path)],
        env={**os.environ, **secure.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == hashlib.sha256(every(data)[0].numpy().tobytes()).hexdigest()
    assert not any(secure.faults.values())


def test_a_certificate_that_is_not_trusted_is_said_at_once(secure, data):
    remote._manifests.clear()
    with pytest.raises(UserError, match=r"cannot fetch https://.*/manifest\.json .*certificate is not trusted here"):
        read_manifest(secure.upload(data, "digits"))
    assert secure.log == []
