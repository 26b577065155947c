"""Nothing is unpickled, nothing is writable by all, nothing secret is written down, nobody else reaches the ranks."""

import ast
import os
import stat
from pathlib import Path

import pytest
import ranks

ROOT = Path(__file__).parents[2]
SOURCES = [p for folder in ("sharding", "gdd_dist", "tune") for p in (ROOT / folder).rglob("*.py")]
SECRETS = ["AKIASECRET", "s3cr3t-in-a-url", "s3cr3t-in-the-environment"]


def calls(path: Path):
    """(dotted name, keyword names → constants) of every call in a source."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            yield ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_unpickles_or_evaluates_what_it_reads(path):
    for name, keywords in calls(path):
        assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "joblib.load"}, (
            name
        )
        if name == "torch.load":
            assert keywords["weights_only"] is True
        if name == "np.load":
            assert keywords["allow_pickle"] is False
        if name.startswith("subprocess."):
            assert not keywords.get("shell")


def test_files_have_the_umask_of_the_user_and_none_is_writable_by_all(tiny, tmp_path):
    modes = {}
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try:
            out = tmp_path / f"{umask:03o}" / "out"
            out.parent.mkdir(mode=0o777)
            ended = ranks.launch(tmp_path / f"job-{umask:03o}", 1, with_umask, (umask, out, tiny)).wait()
        finally:
            os.umask(before)
        assert ended.codes == [0], ended.text
        paths = [p for p in (out, *out.rglob("*")) if not p.is_symlink()]
        modes[umask] = {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_file()}
        assert not [p for p in paths if p.stat().st_mode & stat.S_IWOTH]
    assert modes == {0o000: {0o664}, 0o077: {0o600}}


def with_umask(rank, umask, out, argv):
    os.umask(umask)
    ranks._train(rank, ["--out", str(out), *argv, "--until", "gan"], None)


def test_keys_in_urls_and_in_the_environment_are_written_nowhere(undisturbed, tmp_path, digits):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits", "matching")
    ended = ranks.launch(tmp_path / "job", 1, with_secrets, (out, digits, undisturbed.argv)).wait()
    assert ended.codes == [0], ended.text
    names = {p.name.partition(".")[0] for p in out.rglob("*")}
    assert {"config", "generator", "events", "metrics", "report"} <= names
    for path in (p for p in out.rglob("*") if p.is_file()):
        found = [s for s in SECRETS if s.encode() in path.read_bytes()]
        assert not found, f"{path}: {found}"
    assert "https://***@host/runs?***" in (out / "config.yaml").read_text()
    assert not any(s in ended.text + "".join(ended.out) for s in SECRETS)


def with_secrets(rank, out, digits, argv):
    os.environ["AWS_SECRET_ACCESS_KEY"] = SECRETS[2]
    url = f"https://{SECRETS[0]}:{SECRETS[1]}@host/runs?token={SECRETS[1]}"
    from gdd_dist.pipeline import run
    from gdd_dist.storage.store import Store

    run.Store = lambda _root: Store(out)  # what a remote store would be
    few = ["--until", "report", "--report.seeds", "1", "--report.epochs", "1", "--report.baselines", "gan"]
    ranks._train(rank, ["--out", str(out), *argv, "--store", url, *few], None)


@pytest.mark.slow
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
def test_a_fault_names_its_url_without_the_key(tmp_path, debug):
    url = f"https://{SECRETS[0]}:{SECRETS[1]}@host/digits?token={SECRETS[1]}"
    ended = ranks.start(tmp_path / "out", ["--data", url, *debug]).wait()
    assert ended.codes == [2]
    assert len(ended.errors) == 1
    assert not any(s in ended.text + "".join(ended.out) for s in SECRETS), ended.text
