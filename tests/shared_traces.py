"""Traces that tests share: a decoder is traced once a process for each config, whatever its weights are.

Tracing takes most of the time of a small build, and what it gives depends on no weight: `trace_decoder` keeps the captured
programs, and binds them to the weights at hand. tests/conftest.py has builds and exports use it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from camshaft.export.cache import constant_digest
from camshaft.graph.program import Program
from camshaft.graph.weights import Weight, WeightMap
from camshaft.models import huggingface
from camshaft.models.huggingface import ModelSource
from torch import Tensor

_trace = huggingface.trace_decoder
_programs: dict[str, Program] = {}


def trace_decoder(source: ModelSource) -> Program:
    """What `camshaft.models.huggingface.trace_decoder` gives for `source`; later calls for an equal config are copies."""
    buffers = _computed_buffers(source)
    key = _key(source, buffers)
    if key not in _programs:
        program = _trace(source)
        _programs[key] = program.clone()
        return program
    copied = _programs[key].clone()
    held = {**source.weights, **{name: Weight.from_tensor(value.clone()) for name, value in buffers.items()}}
    weights = WeightMap({name: held.get(name, weight) for name, weight in copied.weights.items()})
    return replace(copied, name=source.name, info={**copied.info, **source.info}, weights=weights)


def _computed_buffers(source: ModelSource) -> dict[str, Tensor]:
    """The buffers that a model computes rather than stores: constants of the trace."""
    model: Any = source.model
    stored = model.state_dict()
    named = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in named if name not in stored and buffer.device.type != "meta"}


def _key(source: ModelSource, buffers: dict[str, Tensor]) -> str:
    """Everything that a trace depends on, as the key of the build cache has it."""
    model: Any = source.model
    facts = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "positions": source.max_positions,
        "weights": {name: [list(weight.shape), str(weight.dtype)] for name, weight in source.weights.items()},
        "constants": constant_digest(buffers),
    }
    return json.dumps(facts, sort_keys=True, default=str)
