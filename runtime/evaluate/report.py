"""What an evaluation found: the JSON document, one table of quality, size and speed, and a page with a plot. Imports no torch."""

from __future__ import annotations

import datetime
import html
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.charts import Bubble, bubble_chart
from ..bench.page import html_table, page

KIND, FORMAT = "camshaft-eval", 1
SUFFIXES = (".html", ".json")

Document = Mapping[str, Any]
_Cell = Callable[[Mapping[str, Any], Mapping[str, Any]], str]
"""Of a result and the reference's."""


def make_document(*, model: Mapping[str, Any], results: Sequence[Mapping[str, Any]], **parts: Any) -> dict[str, Any]:
    """The document; parts: more of it by key, such as the text's name and the context. results: the reference's first."""
    from ..bench.environment import git_commit, machine, package_versions

    return {
        "kind": KIND,
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {"python": sys.version.split()[0], **package_versions()},
        "machine": machine(),
        "git": git_commit(),
        "model": dict(model),
        **parts,
        "results": [dict(result) for result in results],
    }


def check_output(path: Path) -> None:
    """Raises ValueError for a file that is neither HTML nor JSON by its name, or whose folder is not there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'}; allowed: {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory; make it, or give another path")


def write_report(document: Document, path: Path) -> None:
    """Writes the page (.html) or the document (.json)."""
    check_output(path)
    text = report_html(document) if path.suffix == ".html" else json.dumps(document, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- table
def result_table(document: Document, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): one row for each recipe, columns of what was measured; brief: without medians, errors and ratios."""
    results = document["results"]
    columns: list[tuple[str, _Cell]] = [("recipe", lambda entry, base: entry["recipe"])]
    if any("text" in entry for entry in results):
        columns.append(("perplexity", lambda entry, base: f"{entry['text']['perplexity']:.4f}"))
    if any("divergence" in entry for entry in results):
        columns += [("increase", _increase(brief)), ("KL mean", _kl("kl_mean"))]
        columns += [] if brief else [("KL median", _kl("kl_median"))]
        columns += [("KL p99", _kl("kl_p99")), ("top-1", _top1)]
    for index, task in enumerate(results[0].get("tasks", ())):
        for metric in [name for name in task["metrics"] if not name.endswith("_stderr")]:
            columns.append((f"{task['name']} {metric}", _task(index, metric, brief)))
    columns.append(("weights MB", lambda entry, base: f"{entry['weights_bytes'] / 1e6:,.1f}"))
    if any(entry["artifact_bytes"] is not None for entry in results):
        columns.append(("engine MB", lambda entry, base: f"{entry['artifact_bytes'] / 1e6:,.1f}"))
    if any("speed" in entry for entry in results):
        batch = results[0]["speed"]["batch"]
        columns += [("tok/s at 1", _speed("batch_1_tok_s", brief)), (f"tok/s at {batch}", _speed("batch_tok_s", brief))]
    return [name for name, _ in columns], [[cell(entry, results[0]) for _, cell in columns] for entry in results]


def _increase(brief: bool) -> _Cell:
    def cell(entry: Mapping[str, Any], base: Mapping[str, Any]) -> str:
        found = entry.get("divergence")
        if found is None:
            return "-"
        more = f"{100 * (found['perplexity_ratio'] - 1):+.2f}%"
        return more if brief else f"{more} ± {100 * found['perplexity_ratio_stderr']:.2f}"

    return cell


def _kl(name: str) -> _Cell:
    return lambda entry, base: f"{entry['divergence'][name]:.5f}" if "divergence" in entry else "-"


def _top1(entry: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    return f"{entry['divergence']['top1_agreement']:.2%}" if "divergence" in entry else "-"


def _task(index: int, metric: str, brief: bool) -> _Cell:
    def cell(entry: Mapping[str, Any], base: Mapping[str, Any]) -> str:
        metrics = entry["tasks"][index]["metrics"]
        stderr = metrics[f"{metric}_stderr"]
        return f"{metrics[metric]:.4f}" + ("" if brief or stderr is None else f" ± {stderr:.4f}")

    return cell


def _speed(name: str, brief: bool) -> _Cell:
    def cell(entry: Mapping[str, Any], base: Mapping[str, Any]) -> str:
        rate = entry["speed"][name]
        return f"{rate:,.1f}" + ("" if brief else f" ({rate / base['speed'][name]:.2f}x)")

    return cell


# ----------------------------------------------------------------------------------------------------------------- page
def report_html(document: Document) -> str:
    """One page: the table, the plot, and the conditions."""
    note = (
        "Increase: of the perplexity over the first row's, ± its standard error by tokens. KL: divergence from the first row in "
        "nats per token. Top-1: share of tokens after which both have the same likeliest token. Speed: output tokens per second "
        "of one request at a time, prompts aside, and of several at once, prompts included; the ratio is to the first row."
    )
    columns, rows = result_table(document)
    sections = [
        ("Quality, size and speed", html_table(columns, rows) + f'<p class="note">{note}</p>'),
        ("Quality against size", _plot(document)),
        ("Notes of the builds", _notes(document)),
        ("Conditions", _conditions(document)),
    ]
    name = document["model"]["name"]
    return page(f"Camshaft: recipes of {name}", f"Recipes of {name}", sections)


def _plot(document: Document) -> str:
    """Weights against the increase of the perplexity; a circle's area is the speed of a batch."""
    bubbles = []
    for entry in document["results"]:
        if "text" not in entry:
            return ""
        ratio = entry["divergence"]["perplexity_ratio"] if "divergence" in entry else 1.0
        speed = entry["speed"]["batch_tok_s"] if "speed" in entry else None
        note = "" if speed is None else f"({speed:,.0f} tokens/s)"
        bubbles.append(Bubble(entry["recipe"], entry["weights_bytes"] / 1e6, 100 * (ratio - 1), speed, note))
    title = "Perplexity against size" + ("; areas: tokens/s" if "speed" in document["results"][0] else "")
    return bubble_chart(title, bubbles, x_label="weights, MB", y_label="increase of the perplexity, %")


def _notes(document: Document) -> str:
    lines = [f"{entry['recipe']} failed: {entry['error']}" for entry in document.get("failed", ())]
    lines += [f"{entry['recipe']}: {line}" for entry in document["results"] for line in entry["report"]]
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _conditions(document: Document) -> str:
    machine, versions, model = document["machine"], document["versions"], document["model"]
    git = document.get("git") or {}
    text = document.get("text")
    rows = [
        ["model", f"{model['name']}, {model['num_parameters'] / 1e6:,.1f} M parameters, {model['dtype']}"],
        ["machine", ", ".join(machine["gpus"]) or f"{machine['cores']} x {machine['cpu']}"],
        [
            "versions",
            f"camshaft {versions.get('camshaft')}, torch {versions.get('torch')}, triton {versions.get('triton')}",
        ],
        ["commit", str(git.get("commit") or "-")[:12] + (" and changes" if git.get("dirty") else "")],
        ["date", document["date"]],
    ]
    if text is not None:
        rows.insert(1, ["text", f"{text['name']}, {text['num_tokens']:,} tokens in windows of {text['context']}"])
    return html_table(["", ""], rows) + f"<p><code>{html.escape(document['command'])}</code></p>"
