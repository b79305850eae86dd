"""Segments and steps: a Program cut into pieces that a target lowers, and the order in which they run.

token_ids, positions -> [segment 0] -> q, k, v -> (attention 0) -> [segment 1] -> q, k, v -> (attention 1) -> ...
                                                                    ^ equal layers are one segment, lowered once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..graph.serialize import graph_from_json


@dataclass(frozen=True)
class Segment:
    """A piece of a graph without attention, lowered once for all places where it occurs.

    id: hash of `nodes`; nodes: the graph as JSON (placeholders: num_inputs activations, then weights); num_outputs.
    eager: it holds operators that no target lowers and runs in plain PyTorch (`operators` names them).
    sizes: of a module's segment, each varying size with its value in the trace, at which it is lowered.
    """

    id: str
    nodes: list[dict[str, Any]]
    num_inputs: int
    num_weights: int
    num_outputs: int
    eager: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    def graph_module(self, device: torch.device) -> fx.GraphModule:
        """The segment as an executable GraphModule on `device`."""
        return graph_from_json(self.nodes, device)

    @property
    def placeholders(self) -> list[dict[str, Any]]:
        """The entries of the inputs: activations first, then weights."""
        return [entry for entry in self.nodes if entry["op"] == "placeholder"]

    @property
    def operators(self) -> list[str]:
        """The names of the operators in it, in order."""
        return [entry["target"] for entry in self.nodes if entry["op"] == "call_function"]


@dataclass(frozen=True)
class SegmentStep:
    """Runs a segment: weights by name, inputs and outputs by slot."""

    segment: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionStep:
    """Runs paged attention of one layer on slots q, k, v [1, T, heads, D]; sinks and alibi_slopes are weight names.

    cos, sin: slots [1, T, R] of the angles that it turns q and k by (`camshaft::rope`), None where they are turned already.
    """

    layer: int
    group: int
    q: str
    k: str
    v: str
    output: str
    sinks: str | None
    alibi_slopes: str | None
    scale: float
    window: int
    softcap: float
    cos: str | None = None
    sin: str | None = None
    interleaved: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The slots that it reads."""
        return tuple(name for name in (self.q, self.k, self.v, self.cos, self.sin) if name is not None)


Step = SegmentStep | AttentionStep


@dataclass
class Plan:
    """All distinct segments, and the steps of one pass through the model.

    inputs: slots that the caller fills (token_ids, positions, sample_rows, or a module's arguments); outputs: slots that hold
    the results. parts: plans of the program's further graphs by name; their segments are among `segments`.
    """

    segments: dict[str, Segment]
    steps: list[Step]
    inputs: list[str]
    outputs: list[str]
    report: list[str] = field(default_factory=list)
    parts: dict[str, Plan] = field(default_factory=dict)

    @property
    def has_logits(self) -> bool:
        """Whether the first output is logits of sampled rows."""
        return "sample_rows" in self.inputs

    @property
    def hidden_input(self) -> tuple[int, torch.dtype] | None:
        """Width and dtype of the hidden states [1, T, H] that a step brings beside its tokens, None where it brings none."""
        for step in self.steps:
            if isinstance(step, SegmentStep) and "hidden" in step.inputs and "hidden" in self.inputs:
                entry = self.segments[step.segment].placeholders[step.inputs.index("hidden")]
                return int(entry["shape"][-1]), getattr(torch, entry["dtype"])
        return None

    @property
    def weight_names(self) -> list[str]:
        """Every weight that a step names, those of parts behind, each once, in order of first use."""
        names: dict[str, None] = {}
        for step in (*self.steps, *(step for part in self.parts.values() for step in part.steps)):
            used = step.weights if isinstance(step, SegmentStep) else (step.sinks, step.alibi_slopes)
            names.update(dict.fromkeys(name for name in used if name))
        return list(names)

    def add_part(self, name: str, part: Plan) -> None:
        """Adds a plan of a further graph: segments that are equal to ones that are here are shared."""
        self.segments.update({id: segment for id, segment in part.segments.items() if id not in self.segments})
        own = {id: self.segments[id] for id in part.segments}
        self.parts[name] = Plan(own, part.steps, part.inputs, part.outputs)
        self.report = sorted({*self.report, *part.report})

    def then(self, after: Plan, links: Mapping[str, str]) -> Plan:
        """This plan and another one behind it, whose inputs `links` are slots of this one; the other's outputs come first."""
        places = {name: f"{name}.then" for name in _slots(after)}
        places |= {name: name for name in after.inputs} | dict(links)
        inputs = [*self.inputs, *(name for name in after.inputs if name not in links and name not in self.inputs)]
        steps = [*self.steps, *(_renamed(step, places) for step in after.steps)]
        outputs = [*(places[name] for name in after.outputs), *self.outputs]
        return Plan({**self.segments, **after.segments}, steps, inputs, outputs)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "segments": [vars(segment) for segment in self.segments.values()],
            **self._steps_to_json(),
            "report": self.report,
            "parts": {name: part._steps_to_json() for name, part in self.parts.items()},
        }

    def _steps_to_json(self) -> dict[str, Any]:
        steps = [{"kind": type(step).__name__, **vars(step)} for step in self.steps]
        return {"steps": steps, "inputs": self.inputs, "outputs": self.outputs}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        segments = {entry["id"]: Segment(**entry) for entry in data["segments"]}
        plan = cls(segments, _steps_from_json(data["steps"]), data["inputs"], data["outputs"], data["report"])
        for name, entry in data.get("parts", {}).items():
            steps = _steps_from_json(entry["steps"])
            used = {step.segment: segments[step.segment] for step in steps if isinstance(step, SegmentStep)}
            plan.parts[name] = cls(used, steps, entry["inputs"], entry["outputs"])
        return plan


def _steps_from_json(entries: Sequence[dict[str, Any]]) -> list[Step]:
    steps: list[Step] = []
    for entry in entries:
        fields: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in entry.items() if key != "kind"
        }
        steps.append(SegmentStep(**fields) if entry["kind"] == "SegmentStep" else AttentionStep(**fields))
    return steps


def _slots(plan: Plan) -> set[str]:
    """The names of all slots that a plan's steps write."""
    names: set[str] = set()
    for step in plan.steps:
        names.update(step.outputs if isinstance(step, SegmentStep) else (step.output,))
    return names


def _renamed(step: Step, places: Mapping[str, str]) -> Step:
    """A step on other slots."""
    if isinstance(step, SegmentStep):
        inputs, outputs = (tuple(places[name] for name in names) for names in (step.inputs, step.outputs))
        return replace(step, inputs=inputs, outputs=outputs)
    given = {name: getattr(step, name) for name in ("q", "k", "v", "output", "cos", "sin")}
    new: dict[str, Any] = {name: places[slot] for name, slot in given.items() if slot is not None}
    return replace(step, **new)
