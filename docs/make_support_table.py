"""Writes docs/support.json from a trace of every family in tests/families.py, and the table of it into README.md.

python docs/make_support_table.py            trace all families, write both files
python docs/make_support_table.py --missing  trace only the families that the JSON lacks
python docs/make_support_table.py --render   write README.md from the JSON that is there
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "support.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
HEAD = ("Family", "Architecture", "Attention comes in by", "Features", "Checked against eager")
CHECKS = {
    "long": "32 requests, saved engine",
    "short": "4 requests",
}
"""What tests/models/test_families.py does: FAMILIES the long check, MORE_FAMILIES the short one."""


def describe(name: str) -> dict[str, Any]:
    """One family's row: traced, canonicalized, and read off the graph."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from camshaft.models.huggingface import open_model, trace_decoder
    from camshaft.passes.manager import PassManager
    from camshaft.passes.pipeline import canonicalize_passes
    from families import FAMILIES, random_model, tiny_config

    source = open_model(random_model(tiny_config(name)), torch.float32)
    program = PassManager(canonicalize_passes()).run(trace_decoder(source))
    recognised = next(record.num_matches for record in program.history if record.name == "match_attention")
    return {
        "family": name,
        "architecture": source.info["architecture"],
        "attention": "recognised form" if recognised else "attention interface",
        "features": features(program),
        "check": "long" if name in FAMILIES else "short",
    }


def features(program: Any) -> list[str]:
    """What attention and experts use, read off a canonical program."""
    import torch

    ops = torch.ops.camshaft
    found: set[str] = set()
    for node in program.graph.nodes:
        if node.target is ops.attention.default:
            q, k, v, _, sinks, slopes, _, window, softcap = node.args
            heads, kv_heads = q.meta["val"].shape[1], k.meta["val"].shape[1]
            if kv_heads < heads:
                found.add("MQA" if kv_heads == 1 else "GQA")
            if k.meta["val"].shape[3] != v.meta["val"].shape[3]:
                found.add("K and V of different size")
            if window:
                found.add("window")
            if softcap:
                found.add("soft cap")
            if sinks is not None:
                found.add("sinks")
            if slopes is not None:
                found.add("ALiBi")
        if node.target is ops.moe.default:
            found.add("MoE")
    order = ("GQA", "MQA", "K and V of different size", "window", "soft cap", "sinks", "ALiBi", "MoE")
    return [feature for feature in order if feature in found]


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of the JSON's rows."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for row in rows:
        cells = (
            row["family"],
            f"`{row['architecture']}`",
            row["attention"],
            ", ".join(row["features"]),
            CHECKS[row["check"]],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def between_markers(text: str) -> str:
    """What stands between the markers of a README."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Writes the two files."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES, MORE_FAMILIES

    warnings.filterwarnings("ignore")
    rows = json.loads(JSON.read_text()) if {"--missing", "--render"} & set(sys.argv) else []
    if "--render" not in sys.argv:
        known = {row["family"] for row in rows}
        for name in sorted({**FAMILIES, **MORE_FAMILIES}.keys() - known):
            rows.append(describe(name))
            print(rows[-1], flush=True)
        JSON.write_text(json.dumps(sorted(rows, key=lambda row: row["family"]), indent=1) + "\n")
    text = README.read_text()
    rendered = table(json.loads(JSON.read_text()))
    README.write_text(text.split(BEGIN)[0] + f"{BEGIN}\n{rendered}\n{END}" + text.split(END)[1])


if __name__ == "__main__":
    main()
