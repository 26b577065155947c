"""docs/settings.md, the reference of all settings, from the code.

python docs/settings.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gdd_dist.config.bounds import options, value_of
from gdd_dist.config.presets import PRESETS
from gdd_dist.config.settings import Config

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# All settings

This page is written by `python docs/settings.py` from `gdd_dist/config/settings.py`. Do not change it by hand.

- On the command line a setting is `--NAME VALUE`, for instance `--matching.steps 1000`. Several values follow each other: `--report.ipc 1 10`.
- In a file for `--config FILE` it is YAML, as `--print_config` prints it.
- The strongest comes last: defaults, preset, file, command line.
- A setting with a star (\\*) says only where something lies or how fast it runs. It changes no numbers, so a change of it computes nothing anew.
"""


def page() -> str:
    """The whole page, Markdown."""
    config, text, section = Config(), [HEAD], ""
    text += [_heading("The whole run."), *_table_head()]
    for name, _hint, field in options():
        if (now := name.rpartition(".")[0]) != section:
            section = now
            text += [_heading(type(getattr(config, section)).__doc__, section), *_table_head()]
        star = r" \*" if field.metadata["where"] else ""
        allowed, said = _allowed(field), field.metadata["help"].replace("|", r"\|")
        text.append(f"| `{name}`{star} | {_shown(value_of(config, name))} | {allowed} | {said} |")
    return "\n".join([*text, *_presets()]) + "\n"


def _heading(doc: str | None, section: str = "run") -> str:
    return f"\n## {section}\n\n{doc}\n"


def _table_head() -> list[str]:
    return ["| setting | default | allowed | what it is |", "|---|---|---|---|"]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "not set"
    if isinstance(value, (list, tuple)):
        return " ".join(_shown(item) for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(field: dataclasses.Field[Any]) -> str:
    meta = field.metadata
    if meta["choices"]:
        return " ".join(f"`{choice}`" for choice in meta["choices"])
    limits = (("low", "at least"), ("above", "more than"), ("high", "at most"), ("below", "less than"))
    return ", ".join(f"{words} {meta[key]}" for key, words in limits if meta[key] is not None)


def _presets() -> list[str]:
    """What each preset sets; the default where it sets nothing."""
    names = [name for name, _, _ in options() if any(name in preset for preset in PRESETS.values())]
    rows = [
        f"| `{name}` | {' | '.join(_shown(preset.get(name, value_of(Config(), name))) for preset in PRESETS.values())} |"
        for name in names
    ]
    head = [f"| setting | {' | '.join(PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    return [_heading("What `--preset NAME` changes; other settings keep their defaults.", "presets"), *head, *rows]


if __name__ == "__main__":
    PAGE.write_text(page())
