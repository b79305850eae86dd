"""The JSON document of a benchmark, and two of them side by side. Imports no torch."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measure import Repeat
from .statistics import summarize
from .workload import Workload

KIND, FORMAT = "camshaft-bench", 1

HIGHER_IS_BETTER = ("output_tok_s", "decode_tok_s", "total_tok_s", "requests_s", "goodput_requests_s", "slo_share")
LOWER_IS_BETTER = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "decode_ms", "request_s", "duration_s")


def result_entry(system: str, mode: str, repeats: Sequence[Repeat], **facts: Any) -> dict[str, Any]:
    """One system's part: all repeats, and median, min and max of every metric."""
    return {
        "system": system,
        "mode": mode,
        **facts,
        "summary": summarize(repeats),
        "repeats": [dict(r) for r in repeats],
    }


def make_document(
    *,
    model: Mapping[str, Any],
    workload: Workload,
    results: Sequence[Mapping[str, Any]],
    command: Sequence[str] | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """The document: what was run, where, with which versions, and all results.

    parts: more of it, by key, such as the case's name, seconds of the start-up, or a profile.
    """
    from .environment import git_commit, machine, package_versions

    return {
        "kind": KIND,
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command if command is not None else sys.argv),
        "versions": {"python": sys.version.split()[0], **package_versions()},
        "machine": machine(),
        "git": git_commit(),
        "model": dict(model),
        "workload": asdict(workload),
        **parts,
        "results": [dict(result) for result in results],
    }


def read_document(path: Path) -> dict[str, Any]:
    """Reads a document. Raises ValueError for a file that is none."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); give files that `camshaft bench --output FILE` wrote"
        ) from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ValueError(f"{path} is no benchmark document; give files that `camshaft bench --output FILE` wrote")
    if data["format"] > FORMAT:
        raise ValueError(f"{path} has format {data['format']}, this Camshaft reads up to {FORMAT}; upgrade camshaft")
    return data


@dataclass(frozen=True)
class Difference:
    """One metric of one system in two documents.

    ratio: second over first median. verdict: "better", "worse", or "within spread" where the two ranges overlap.
    """

    system: str
    metric: str
    first: dict[str, float]
    second: dict[str, float]
    ratio: float
    verdict: str


def compare_documents(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """The metrics that both documents have for the same system, mode and request rate; systems are matched by name, batch size
    aside.
    """
    others = {_key(entry): entry for entry in second["results"]}
    differences = []
    for entry in first["results"]:
        other = others.get(_key(entry))
        if other is None:
            continue
        for metric, ours in entry["summary"].items():
            theirs = other["summary"].get(metric)
            if theirs is None or not _direction(metric):
                continue
            ratio = theirs["median"] / ours["median"] if ours["median"] else float("nan")
            differences.append(Difference(label_of(entry), metric, ours, theirs, ratio, _verdict(metric, ours, theirs)))
    return differences


def unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between the conditions of two documents: workload, machine, model and versions."""
    lines = []
    for part in ("workload", "machine", "model", "versions"):
        one, two = first[part], second[part]
        for key in dict.fromkeys([*one, *two]):
            if key in ("free_memory_bytes", "load_average", "path", "report"):
                continue
            if one.get(key) != two.get(key):
                lines.append(f"{part}.{key}: {one.get(key)} | {two.get(key)}")
    return lines


def label_of(entry: Mapping[str, Any]) -> str:
    """A result's system, with its request rate where it has one: "camshaft, 4/s"."""
    rate = entry.get("request_rate")
    if rate is None:
        return str(entry["system"])
    return f"{entry['system']}, " + ("all at once" if rate == "inf" else f"{rate:g}/s")


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["system"].split(" of ")[0], entry["mode"], str(entry.get("request_rate"))


def _direction(metric: str) -> int:
    if metric in HIGHER_IS_BETTER:
        return 1
    return -1 if metric.startswith(LOWER_IS_BETTER) else 0


def _verdict(metric: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    if ours["min"] <= theirs["max"] and theirs["min"] <= ours["max"]:
        return "within spread"
    grew = theirs["median"] > ours["median"]
    return "better" if grew == (_direction(metric) > 0) else "worse"
