"""How to reproduce a report: settings as a file for --config, the command, fingerprints, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdd_dist.config.settings import SECTIONS
from gdd_dist.reporting.tables import NONE, markdown
from gdd_dist.training.context import Context


def reproduce(ctx: Context, metrics: Mapping[str, Any]) -> str:
    """Return the command and every setting that changes results; those that change only where or how fast are left out."""
    commit = f"git checkout {metrics['commit']}\n" if metrics["commit"] else ""
    ranks = metrics["hardware"]["ranks"]
    start = "python" if ranks == 1 else f"torchrun --nproc_per_node={ranks}"
    return (
        f"Use the data set whose fingerprint is below (`python -m sharding info DATA` prints it) and the settings in `settings.yaml`:\n\n"
        f"```sh\n{commit}{start} -m gdd_dist.train --config settings.yaml --data DATA --out OUT\n```\n\n"
        f"```yaml\n{settings_yaml(ctx)}\n```\n\n"
        "The results are equal bit for bit on the same kind of CPU with the same number of ranks and threads; elsewhere up to rounding."
    )


def settings_yaml(ctx: Context) -> str:
    """Return every setting that changes results, as YAML for --config."""
    lines = [f"seed: {ctx.config.seed}", f"precision: {ctx.precision}"]
    for section in SECTIONS:
        lines.append(f"{section}:")
        own = getattr(getattr(ctx.config, section), "seed", None)
        values = ({"seed": own} if own is not None else {}) | ctx.config.shaping(section)
        lines += [f"  {name}: {_yaml(value)}" for name, value in values.items() if value is not None]
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def provenance_table(fingerprints: Mapping[str, str], metrics: Mapping[str, Any], changed: bool) -> str:
    """Return a table of fingerprints, commit, hardware and versions."""
    h, v = metrics["hardware"], metrics["versions"]
    device = "" if h["device"] == "cpu" else f"{h['device']}; "
    lines = [[name, f"`{fp}`"] for name, fp in fingerprints.items()]
    lines += [
        ["commit", f"`{metrics['commit']}`{', then changed' if changed else ''}" if metrics["commit"] else NONE],
        ["hardware", f"{device}{h['cpu']}, {h['cores']} cores, {h['ranks']} {'rank' if h['ranks'] == 1 else 'ranks'}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in v.items())],
    ]
    return markdown(("what", "value"), lines, left=2)
