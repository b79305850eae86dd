"""Hidden states of a step, and which of its rows belong to whose text.

    plan     | a | b b b | c c c c |      a decodes, b verifies two drafts, c computes a part of its prompt
    states   [T, L, H], a row each
    kept     | a | b b . | c c c c |      b's second draft was rejected

A row is kept for every position that is part of a request's text now, whoever samples: prompts, their chunks, last known tokens,
accepted drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..batch import Engine
from ..plan import StepPlan
from ..request import Request
from .verification import Outcome


@dataclass(frozen=True, slots=True)
class StepHidden:
    """What a step gave, on the device."""

    states: torch.Tensor
    """[T, L, H]"""
    preemptions: Sequence[int]
    """[S] how often each of the plan's requests had been preempted when the step was launched."""


class KeptRows(NamedTuple):
    """Rows of one request."""

    place: int
    """Of the request in the plan."""
    request: Request
    start: int
    """Position of the first row; those behind it follow."""
    rows: Sequence[int]
    """Rows of `StepHidden.states`."""


def columns_of(engine: Engine, layers: Sequence[int]) -> list[int]:
    """Where these hidden layers are among those that an engine gives. Raises ValueError for an engine without one of them."""
    given: tuple[int, ...] = getattr(engine, "hidden_layers", ())
    missing = [layer for layer in layers if layer not in given]
    if missing:
        wanted = tuple(dict.fromkeys((*given, *layers)))
        raise ValueError(
            f"the proposer reads hidden states {tuple(layers)} and the engine was built with hidden_layers={given}; compile it "
            f"with hidden_layers={wanted}"
        )
    return [given.index(layer) for layer in layers]


def kept_rows(plan: StepPlan, hidden: StepHidden, outcomes: Mapping[int, Outcome]) -> Iterator[KeptRows]:
    """The rows of every request that runs on, as it did when the step was launched. outcomes: by index in the plan."""
    starts: Any = plan.starts.tolist()
    num_decodes = len(plan.decodes)
    for index, (request, start) in enumerate(zip(plan.decodes, starts)):
        if _runs_on(request, hidden.preemptions[index]):
            yield KeptRows(index, request, start, (index,))
    first = num_decodes
    for index, row in enumerate(plan.others, num_decodes):
        if _runs_on(row.request, hidden.preemptions[index]):
            known = first + row.num_tokens - row.num_draft_tokens
            nodes = outcomes[index].nodes if index in outcomes else ()
            chain = nodes == tuple(range(len(nodes)))
            rows = range(first, known + len(nodes)) if chain else [*range(first, known), *(known + n for n in nodes)]
            yield KeptRows(index, row.request, row.start, rows)
        first += row.num_tokens


def _runs_on(request: Request, num_preemptions: int) -> bool:
    return not request.is_finished and request.num_preemptions == num_preemptions
