"""Segments and steps: a Program cut into pieces that a target lowers, and the order in which they run.

token_ids, positions -> [segment 0] -> q, k, v -> (attention 0) -> [segment 1] -> q, k, v -> (attention 1) -> ...
                                                                    ^ equal layers are one segment, lowered once
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    the results.
    """

    segments: dict[str, Segment]
    steps: list[Step]
    inputs: list[str]
    outputs: list[str]
    report: list[str] = field(default_factory=list)

    @property
    def weight_names(self) -> list[str]:
        """Every weight that a step names, each once, in order of first use."""
        names: dict[str, None] = {}
        for step in self.steps:
            used = step.weights if isinstance(step, SegmentStep) else (step.sinks, step.alibi_slopes)
            names.update(dict.fromkeys(name for name in used if name))
        return list(names)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "segments": [vars(segment) for segment in self.segments.values()],
            "steps": [{"kind": type(step).__name__, **vars(step)} for step in self.steps],
            "inputs": self.inputs,
            "outputs": self.outputs,
            "report": self.report,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        segments = [Segment(**entry) for entry in data["segments"]]
        steps: list[Step] = []
        for entry in data["steps"]:
            fields: dict[str, Any] = {
                key: tuple(item) if isinstance(item, list) else item for key, item in entry.items() if key != "kind"
            }
            steps.append(SegmentStep(**fields) if entry["kind"] == "SegmentStep" else AttentionStep(**fields))
        return cls(
            {segment.id: segment for segment in segments}, steps, data["inputs"], data["outputs"], data["report"]
        )
