"""The net under every program: outputs that are closed, broken or not UTF-8, and faults that nobody foresaw."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

from gdd_dist.runtime.process_identity import place
from sharding.errors import UserError
from sharding.interrupts import started

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, sys, threading
from gdd_dist.runtime.run_program import run_program
def main(argv, joined):
    exec(os.environ["DO"])
run_program(main, sys.argv[1:])
"""


def run(do, *argv, shell='exec "$@"', **environment):
    """A program that does ``do``, started by a shell that may redirect its outputs."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", PROGRAM, *argv]
    env = {**os.environ, "DO": do, **environment}
    return subprocess.run(command, capture_output=True, env=env, check=False, timeout=300)


def test_what_an_output_cannot_encode_is_escaped():
    done = run(
        "print('Übung – 林檎 \\udce9'); raise __import__('sharding').errors.UserError('Ü; ü')", PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stdout) == (2, b"\\xdcbung \\u2013 \\u6797\\u6a8e \\udce9\n")
    assert done.stderr == b"error: \\xdc; \\xfc\n"


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- <&-", ">&- 2>&-"])
def test_closed_outputs_swallow_what_is_printed_and_no_file_takes_their_place(tmp_path, closed):
    do = (
        f"f = open({str(tmp_path / 'f')!r}, 'w'); assert f.fileno() > 2; print('lost'); os.system('echo lost'); "
        f"f.write('kept'); f.close(); open({str(tmp_path / 'end')!r}, 'w').close()"
    )
    done = run(do, shell=f'exec "$@" {closed}')
    assert done.returncode == 0
    assert (tmp_path / "f").read_text() == "kept"
    assert (tmp_path / "end").exists()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("to", "says"), [("/dev/full", b"No space left"), ("", b"the program that read")], ids=["full", "gone"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_is_said_in_one_line(to, says, unbuffered):
    shell = f'exec "$@" > {to}' if to else '{ "$@"; echo $? >&2; } | true'
    done = run("__import__('time').sleep(1); print('x' * 100_000)", shell=shell, PYTHONUNBUFFERED=unbuffered)
    lines = [line for line in done.stderr.splitlines() if line != b"2"]
    assert done.returncode == 2 if to else done.stderr.endswith(b"2\n")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(b"error: standard output: ")
    assert says in lines[0]
    assert b"same command again" not in lines[0]  # the work itself is done


def test_an_output_that_was_replaced_before_stays_open():
    replaced = "import os, sys; sys.stdout = os.fdopen(1, 'w', closefd=False)\n"
    code = PROGRAM.replace("run_program(main", f"{replaced}run_program(main")
    env = {**os.environ, "DO": "import gc; gc.collect(); print('seen')"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (0, b"seen\n"), done.stderr


def test_the_status_is_right_though_nobody_can_read_the_error():
    do = "raise __import__('sharding').errors.UserError('x; y')"
    assert run(do, shell='exec "$@" 2>/dev/full').returncode == 2
    assert run("{}['key']", shell='exec "$@" 2>/dev/full').returncode == 1
    assert run("{}['key']", "--debug", shell='exec "$@" 2>/dev/full').returncode == 1
    command = f"{sys.executable} -m sharding info nowhere >/dev/full 2>/dev/full"
    assert subprocess.run(["sh", "-c", command], check=False, cwd=ROOT).returncode == 2


def test_an_unforeseen_fault_is_one_line_that_names_a_file_and_debug_shows_it(tmp_path):
    done = run("def f(): return {}['key']\nf()", TMPDIR=str(tmp_path))
    (file,) = tmp_path.glob("gdd-fault-*.txt")
    assert done.returncode == 1
    assert done.stderr.decode() == (
        f"error: KeyError: 'key' (unexpected: please report it with {file}; --debug prints the same here)\n"
    )
    assert "in f" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    debug = run("{}['key']", "--debug")
    assert debug.returncode == 1
    assert b"Traceback" in debug.stderr
    assert debug.stderr.splitlines()[-1] == b"error: 'key'"


def test_a_fault_of_a_thread_is_one_line_too(tmp_path):
    do = "t = threading.Thread(target=lambda: 1 / 0, name='worker'); t.start(); t.join()"
    done = run(do, TMPDIR=str(tmp_path))
    assert done.returncode == 0
    assert done.stderr.startswith(b"thread worker has ended: ZeroDivisionError: division by zero (unexpected: ")
    assert len(done.stderr.splitlines()) == 1


def test_too_little_memory_is_a_fault_that_the_user_can_mend():
    for do in ("import torch; torch.zeros(2**50, dtype=torch.uint8)", "import numpy as np; np.zeros(2**60, np.uint8)"):
        done = run(do)
        assert done.returncode == 2, done.stderr
        assert b"rank 0's host has not enough memory for step start; " in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "one"}, "RANK=one, "),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=1, "),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "are not valid"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "are not valid"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK=x, "),
    ],
)
def test_a_place_that_no_launcher_gives_is_refused(monkeypatch, environment, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1, 0, 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        place()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, b"RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT; "),
        ({"MASTER_ADDR": "127.0.0.1"}, b"but not MASTER_PORT; "),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, b"MASTER_PORT is 'http'; "),
        ({"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"}, b"does not resolve on this host"),
    ],
)
def test_ranks_that_cannot_meet_say_which_variable_is_wrong(environment, says):
    do = "from gdd_dist.runtime.world import World; joined(World('cpu', 1.0))"
    done = run(do, RANK="0", WORLD_SIZE="2", **environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_no_module_of_ours_hides_one_of_the_standard_library():
    """A program that is started by its file, or within a package, finds what lies beside it first."""
    import gdd_dist

    root = Path(gdd_dist.__file__).parent
    ours = {p.stem for p in root.rglob("*.py")} | {p.name for p in root.rglob("*") if p.is_dir()}
    hidden = {p.relative_to(root).as_posix() for p in root.rglob("*.py") if p.stem in sys.stdlib_module_names}
    assert len(ours) > 50
    assert not hidden


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_shortly_unless_the_user_has_said_otherwise(monkeypatch, given, found):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    ended = run("print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)", **given)
    assert ended.stdout.decode() == f"{found} False\n"


JOIN = "from gdd_dist.runtime.world import World; joined(World('cpu', 1.0))"
AMONG = "from gdd_dist.runtime.signals import asked; asked.among_ranks = True; "


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("port", ["http", "²"])
def test_each_rank_that_cannot_look_for_the_others_says_why(rank, port):
    done = run(AMONG + JOIN, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"error: MASTER_PORT is '{port}'; "), done.stderr


@pytest.mark.parametrize("place", [{"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "²"}])
def test_a_wrong_place_is_said_without_a_look_for_other_ranks(place):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    done = run(AMONG + JOIN, "--help", **where, **place)
    assert done.returncode == 2
    assert re.fullmatch(rb"error: \S+.* in the environment.*\n", done.stderr), done.stderr


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(AMONG + JOIN, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert done.returncode == 2
    assert f"error: port {port} of 127.0.0.1 is in use; choose another MASTER_PORT" in done.stderr.decode()


@pytest.mark.parametrize(
    "command",
    [
        ["gdd_dist.status", "nowhere"],
        ["gdd_dist.export", "nowhere", "to", "--ipc", "1"],
        ["gdd_dist.doctor", "--bad"],
        ["gdd_dist.train", "--print_config", "--bad"],
        ["gdd_dist.train", "--print-config", "--bad"],
        ["tune.search", "--bad"],
    ],
)
def test_a_program_without_ranks_looks_for_none_when_it_fails(command, tmp_path):
    """The store would see a connection, and the program would wait for it."""
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        store.listen()
        port = str(store.getsockname()[1])
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        env |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, check=False)
        store.setblocking(False)
        with pytest.raises(BlockingIOError):
            store.accept()
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: "), done.stderr


def test_a_rank_that_cannot_claim_its_fault_says_it(monkeypatch):
    """Whatever prevents the claim: no address, a name that does not resolve, nobody there, a fault inside torch."""
    from gdd_dist.runtime import rendezvous

    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "no.such.host.invalid",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert rendezvous.claim_before_joining()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(ranks.free_port()))
    monkeypatch.setattr(rendezvous, "_LATER", 0.5)
    assert rendezvous.claim_before_joining()
    monkeypatch.delenv("RANK")
    assert rendezvous.claim_before_joining()


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def _interruptible():
    """In the background a shell has SIGINT ignored, and children would have it ignored too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(
    ("command", "at"),
    [
        (["-m", "gdd_dist.train", "--help"], "gdd_dist.config.command_line"),
        (["-m", "gdd_dist.status", "nowhere"], "gdd_dist.runtime.run_program"),
        (["-m", "sharding", "info", "nowhere"], "sharding.manifest"),
        (["-m", "tune.search", "--help"], "tune.options"),
        ([str(ROOT / "tune" / "search.py"), "--help"], "tune.options"),
        (["-c", "from gdd_dist.entry_points import status; status()"], "gdd_dist.status"),
        (["-c", "from gdd_dist.entry_points import shards; shards()"], "sharding.manifest"),
    ],
)
def test_an_interrupt_while_a_program_is_loaded_shows_no_traceback(command, at, tmp_path):
    """The first import of module ``at`` sends it."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "AT": at}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.usefixtures("_interruptible")
def test_a_loaded_program_says_that_it_was_interrupted():
    done = run("import signal; os.kill(os.getpid(), signal.SIGINT); __import__('time').sleep(60)")
    assert done.returncode == 130
    assert done.stderr.startswith(b"stopped: interrupted; ")


def test_only_our_programs_change_what_an_interrupt_does():
    assert started(["-m"], ["python", "-u", "-m", "gdd_dist.train", "-m", "x"])
    assert not started(["-m"], ["python", "-m", "pytest", "-m", "gdd_dist"])
    assert not started(["prog.py"], ["python", "prog.py", "-m", "gdd_dist.train"])
    assert not started(["-m"], ["python", "-mtimeit"])


def test_a_rank_whose_rank_0_never_comes_says_so_itself_and_torch_prints_no_stack():
    port = str(ranks.free_port())
    do = f"from gdd_dist.runtime import rendezvous; rendezvous._ECHO = 1.0; {AMONG}{JOIN}"
    done = run(do, RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2
    line = f"error: 2 ranks did not connect at 127.0.0.1:{port} within 1 s; check that all are running, or raise --timeout\n"
    assert done.stderr.decode() == line
