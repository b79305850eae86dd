"""Tasks in JSONL, one item a line, scored by log-likelihood; they need neither a network nor another package.

    {"context": "The capital of France is", "choices": [" Rome", " Paris"], "answer": 1}       multiple choice
    {"context": "The capital of France is", "continuation": " Paris"}                          a continuation

A continuation follows its context as it is written, spaces included. Metrics, each with its standard error:

    multiple choice   acc       the answer's log-likelihood is the largest
                      acc_norm  the same, log-likelihoods divided by the choices' lengths in characters (without leading spaces)
    continuation      acc       every token is the likeliest one
                      nats      negative log-likelihood of the whole continuation, mean over items
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .likelihood import Likelihood, encode_pair, likelihoods
from .numbers import standard_error

if TYPE_CHECKING:
    from ..llm import LLM

Kind = Literal["multiple choice", "continuation"]
_FIELDS: dict[frozenset[str], Kind] = {
    frozenset({"context", "choices", "answer"}): "multiple choice",
    frozenset({"context", "continuation"}): "continuation",
}
_FORMS = '{"context", "choices", "answer"} or {"context", "continuation"}'


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a task."""

    context: str
    choices: tuple[str, ...]
    """What is scored; of a continuation: itself alone."""
    answer: int = 0
    """Index of the right choice."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items of one kind."""

    name: str
    kind: Kind
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over items, and its standard error (NaN of one item)."""

    value: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What an engine gave for a task."""

    name: str
    kind: Kind
    num_items: int
    num_truncated: int
    """Items whose context was cut off at its beginning."""
    metrics: dict[str, Metric]

    def to_json(self) -> dict[str, Any]:
        """As plain data; metrics as {"acc": ..., "acc_stderr": ...}, None for a standard error of one item."""
        metrics: dict[str, float | None] = {}
        for name, metric in self.metrics.items():
            metrics[name] = metric.value
            metrics[f"{name}_stderr"] = None if np.isnan(metric.stderr) else metric.stderr
        facts = {"name": self.name, "kind": self.kind, "num_items": self.num_items, "num_truncated": self.num_truncated}
        return {**facts, "metrics": metrics}


def read_task(path: Path) -> Task:
    """A task of a JSONL file, named like the file. Raises ValueError, with the line's number, for an item that is not in order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task {path} cannot be read: {error}") from error
    items: list[Item] = []
    kinds: list[Kind] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            kind, item = _item(json.loads(line))
            if kinds and kind != kinds[0]:
                raise ValueError(f"the item is a {kind}, and those before it are {kinds[0]}; one kind in a file")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}); one item a line: {_FORMS}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        items.append(item)
        kinds.append(kind)
    if not items:
        raise ValueError(f"task {path} has no items; one item a line: {_FORMS}")
    return Task(name=path.stem, kind=kinds[0], items=tuple(items))


def _item(data: Any) -> tuple[Kind, Item]:
    kind = _FIELDS.get(frozenset(data)) if isinstance(data, dict) else None
    if kind is None:
        got = f"fields {', '.join(map(str, data)) or 'none'}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"the item has {got}; allowed: {_FORMS}")
    context = _text(data, "context", may_be_empty=True)
    if kind == "continuation":
        return kind, Item(context, (_text(data, "continuation"),))
    choices, answer = data["choices"], data["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"choices is {choices!r}; allowed: a list of at least two texts, none of them blank")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer!r}; allowed: the right choice's index, 0 to {len(choices) - 1}")
    return kind, Item(context, tuple(choices), answer)


def _text(data: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = data[name]
    if not isinstance(value, str) or not (value or may_be_empty):
        raise ValueError(f"{name} is {value!r}; allowed: a text")
    return value


def run_task(llm: LLM, task: Task, *, progress: bool | None = False) -> TaskResult:
    """Scores all items. Raises ValueError where the engine has no tokenizer, or a choice does not fit its sequences."""
    if llm.tokenizer is None:
        raise ValueError(f"task {task.name} needs a tokenizer and this engine has none")
    tokenizer = llm.tokenizer
    pairs = [encode_pair(tokenizer, item.context, choice) for item in task.items for choice in item.choices]
    scores = likelihoods(llm, pairs, progress=progress)
    rows: list[Sequence[Likelihood]] = []
    for item in task.items:
        rows.append(scores[: len(item.choices)])
        scores = scores[len(item.choices) :]
    metrics = _choice_metrics(task, rows) if task.kind == "multiple choice" else _continuation_metrics(rows)
    truncated = sum(any(score.truncated for score in row) for row in rows)
    return TaskResult(name=task.name, kind=task.kind, num_items=len(rows), num_truncated=truncated, metrics=metrics)


def _choice_metrics(task: Task, rows: Sequence[Sequence[Likelihood]]) -> dict[str, Metric]:
    acc, acc_norm = [], []
    for item, row in zip(task.items, rows, strict=True):
        logprobs = np.array([score.logprob for score in row])
        lengths = np.array([len(choice.lstrip()) for choice in item.choices])
        acc.append(int(logprobs.argmax()) == item.answer)
        acc_norm.append(int((logprobs / lengths).argmax()) == item.answer)
    return {"acc": _mean(acc), "acc_norm": _mean(acc_norm)}


def _continuation_metrics(rows: Sequence[Sequence[Likelihood]]) -> dict[str, Metric]:
    return {
        "acc": _mean([row[0].is_greedy for row in rows]),
        "nats": _mean([-row[0].logprob for row in rows]),
    }


def _mean(values: Sequence[float]) -> Metric:
    array = np.asarray(values, dtype=np.float64)
    return Metric(float(array.mean()), standard_error(array))
