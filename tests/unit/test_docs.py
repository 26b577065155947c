"""Every command in README and docs is parsed by the program it calls; one cheap example of each is run."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Finished

from gdd_dist import completion, doctor, evaluate, export, status
from gdd_dist.config import command_line
from gdd_dist.models import pretrained
from sharding import __main__ as sharding_program
from tune import options

ROOT = Path(__file__).parents[2]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "launchers/README.md")]
PAGES = sorted([*TOP, *(ROOT / "docs").glob("*.md")])
LAUNCHERS = ("torchrun", "deepspeed", "srun", "python", "python3")
PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "gdd_dist.train": command_line.parse,
    "gdd_dist.evaluate": lambda argv: evaluate.parser().parse_args(argv),
    "gdd_dist.export": lambda argv: export.parser().parse_args(argv),
    "gdd_dist.status": lambda argv: status.parser().parse_args(argv),
    "gdd_dist.doctor": lambda argv: doctor.parser().parse_args(argv),
    "gdd_dist.completion": lambda argv: completion.parser().parse_args(argv),
    "tune.search": lambda argv: options.parse([a for a in argv if a != "--resume"]),  # that wants one to resume
    "sharding": lambda argv: sharding_program.parser().parse_args(argv),
}
BLOCK = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """Lines of shell blocks, continued lines joined, comments and prompts off; substitutions `$(…)` are commands too."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            text = " ".join(shlex.split(line, comments=True, posix=False)).removeprefix("$ ")
            yield from re.findall(r"\$\(([^)]*)\)", text)
            yield from (part.strip() for part in re.split(r"&&|\|\||;|\|", text) if part.strip())


def called(command: str) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command that starts one of our programs, under whatever launcher."""
    words = [w for w in shlex.split(command) if w not in ("&", "\\")]
    if "tune/search.py" in words:
        return "tune.search", words[words.index("tune/search.py") + 1 :]
    for i, word in enumerate(words[:-1]):
        if word == "-m" and words[i + 1] in PROGRAMS:
            return words[i + 1], words[i + 2 :]
    return None


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def test_the_pages_show_every_program() -> None:
    shown = {found[0] for _, command in ALL if (found := called(command))}
    assert shown == set(PROGRAMS)


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{p}: {c[:60]}" for p, c in ALL])
def test_every_command_parses(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "_preset_of_data", lambda *_: "digits")
    given = pretrained.Pretrained(Path("a.safetensors"), "convnet", None, None)
    monkeypatch.setattr(pretrained, "files", lambda _directory: [given])
    words = shlex.split(command)
    if found := called(command):
        program, argv = found
        if "--config" in argv:
            file = tmp_path / argv[argv.index("--config") + 1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("seed: 3\n")
        if "--space" in argv:  # one of this repository's
            argv[argv.index("--space") + 1] = str(ROOT / argv[argv.index("--space") + 1])
        if {"--help", "--version"} & set(argv):
            with pytest.raises(SystemExit, match="0"):
                PROGRAMS[program](argv)
        else:
            PROGRAMS[program](argv)
    elif Path(words[0]).name == "make":
        targets = (ROOT / "Makefile").read_text()
        for target in (w for w in words[1:] if "=" not in w):
            assert re.search(rf"^{target}:", targets, re.MULTILINE), f"no make target {target}"
    elif scripts := [w for w in words if w.endswith((".py", ".sh")) and "/" in w and not w.startswith(("/", "~"))]:
        for script in scripts:
            assert (ROOT / script).exists(), f"{script} is not there"


HELPS = [(name, []) for name in PROGRAMS if name != "gdd_dist.train"]
HELPS += [("sharding", [command]) for command in ("build", "info", "verify")]


@pytest.mark.parametrize(("program", "words"), HELPS, ids=lambda value: " ".join(value) if value else "")
def test_help_begins_with_an_example_that_parses(
    program: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "_preset_of_data", lambda *_: "digits")
    with pytest.raises(SystemExit, match="0"):
        PROGRAMS[program]([*words, "--help"])
    example = re.match("example: (.*)\n", capsys.readouterr().out)
    assert example
    found = called(re.sub(r"^eval .*\$\(|\)\"$", "", example[1]))
    assert found
    assert found[0] == program
    PROGRAMS[program](found[1])


def test_readme_is_short_and_names_what_is_typed() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200
    for typed in ("make train", "make test", "torchrun --nproc_per_node=8 -m gdd_dist.train", "tensorboard"):
        assert typed in text
    assert "python tune/search.py" in text


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


NO_PROSE = re.compile(r"^```.*?^```|<!--.*?-->|^(?:#| {4}).*?$|^\|[-: |]+\|$", re.MULTILINE | re.DOTALL)
END = re.compile(r"\n\s*\n|^\s*(?:[-*]|\d+\.) |\s*(?<!\\)\|\s*|(?<=[.!?])[*)\"]*\s", re.MULTILINE)


def lengths(text: str) -> list[int]:
    """Words of each sentence, in paragraphs, lists and cells of tables; code counts as a word, what is shorter than four words not at all."""
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", NO_PROSE.sub("\n\n", text)))
    counts = (sum(bool(re.search(r"\w", word)) for word in part.split()) for part in END.split(prose))
    return sorted(n for n in counts if n > 3)


def test_sentences_are_told_apart() -> None:
    text = "# Head\nOne two three four.\nFive `a b c` six [seven](x.md) eight. Too short.\n\n- a b c d e\n\n| a b c d e f | 1 |\n|---|---|\n"
    assert lengths(text) == [4, 5, 5, 6]


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_sentences_are_short(page: Path) -> None:
    """Most readers are not native speakers: 20 words on average, 30 in nine of ten."""
    found = lengths(page.read_text())
    assert sum(found) / len(found) <= 20
    assert found[len(found) * 9 // 10] <= 30


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    assert [p.name for p in pages if p.name != "index.md" and f"({p.name})" not in index] == []


def test_the_reference_of_settings_is_what_the_code_has() -> None:
    """`python docs/settings.py` writes it anew."""
    assert runpy.run_path(str(ROOT / "docs/settings.py"))["page"]() == (ROOT / "docs/settings.md").read_text()


def run(*argv: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_cheap_example_of_each_program_runs(reported: Finished, digits: Path, tmp_path: Path) -> None:
    """As a user types them, each in a process of its own (train itself runs in most other tests)."""
    assert "digits" in run("sharding", "info", digits, cwd=tmp_path)
    assert "matching" in run("gdd_dist.train", "--print_config", cwd=tmp_path)
    assert "10 images of 10 classes" in run("gdd_dist.export", reported.out, "set", "--ipc", 1, cwd=tmp_path)
    assert "done" in run("gdd_dist.status", reported.out, cwd=tmp_path)
    assert "_shtab_gdd_train" in run("gdd_dist.completion", "bash", cwd=tmp_path)
    assert "matched" in run("gdd_dist.evaluate", reported.out, "--device", "cpu", cwd=tmp_path)


def test_completion_knows_settings_and_their_choices(tmp_path: Path) -> None:
    (tmp_path / "c.sh").write_text(completion.script("bash"))
    asked = {
        "gdd-train --until ma": "matching",
        "gdd-train --matching.temp": "--matching.temperature",
        "gdd-train --report.pro": "--report.protocol",
        "gdd-evaluate --labels ha": "hard",
    }
    for typed, wanted in asked.items():
        program = typed.split()[0].replace("-", "_")
        script = f"source {tmp_path}/c.sh; COMP_WORDS=({typed}); COMP_CWORD={len(typed.split()) - 1}; "
        script += f"_shtab_{program}; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [wanted]


def no_checkout() -> dict[str, str]:
    """The environment without PYTHONPATH: a checkout there would count as installed."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, built from a copy of what git tracks; only the libraries are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source, env = folder / "source", folder / "env"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("gdd_dist-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    into = [*pip, "--python", env / "bin" / "python", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(into, check=True, capture_output=True, env=no_checkout())
    libraries = next(p for p in map(Path, sys.path) if p.name == "site-packages")
    (next((env / "lib").glob("python*/site-packages")) / "libraries.pth").write_text(f"{libraries}\n")
    return env


@pytest.mark.slow
def test_a_wheel_works_from_an_empty_directory_of_a_fresh_environment(
    installed: Path, reported: Finished, tmp_path: Path
) -> None:
    """Every program, every preset, types and launchers, with no checkout in sight."""
    clean = no_checkout() | {"OMP_NUM_THREADS": "1"}

    def call(*argv: object) -> str:
        command = [str(installed / "bin" / str(argv[0])), *map(str, argv[1:])]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in ("gdd_dist", "sharding", "tune"):
        where = Path(call("python", "-c", f"import {package}; print({package}.__file__)"))
        assert installed in where.parents
        assert (where.parent / "py.typed").exists()
    for launcher in (ROOT / "launchers").iterdir():
        assert (installed / "share" / "gdd_dist" / "launchers" / launcher.name).read_bytes() == launcher.read_bytes()
    assert "100 images of 10 classes" in call("gdd-export", reported.out, "set", "--ipc", 10)
    assert "train 100" in " ".join(call("gdd-shards", "info", "set").split())
    assert "done" in call("gdd-status", reported.out)
    assert "matched" in call("gdd-evaluate", reported.out, "--device", "cpu")
    assert "ok" in call("gdd-doctor", "--out", "runs")
    for preset in ("digits", "cifar10", "cifar100", "tiny-imagenet"):
        assert "matching:" in call("gdd-train", "--preset", preset, "--print_config")
    assert "_shtab_gdd_train" in call("python", "-m", "gdd_dist.completion", "bash")
    assert "--trials" in call("python", "-m", "tune.search", "--help")
    call("gdd-train", *reported.argv, "--out", "run", "--until", "shards")
    assert '"shards"' in (tmp_path / "run" / "steps.json").read_text()
