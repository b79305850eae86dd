"""What the tests of whole-graph export share: small models, traced once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from families import random_model, tiny_config


@pytest.fixture(scope="package")
def family() -> Callable[[str], Any]:
    """The small random model of a family."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = random_model(tiny_config(name))
            models[name].config._name_or_path = name
        return models[name]

    return get


@pytest.fixture(scope="package", autouse=True)
def fused_once() -> Iterator[None]:
    """The passes up to the caches take most of an export: once for each model, dtype and kind of logits."""
    from camshaft.export.whole import export

    trace, fuse = export.trace_decoder, export._fused
    programs: dict[Any, Any] = {}

    def fused(source: Any, config: Any) -> Any:
        key = (source.name, config.dtype, config.logits)
        if key not in programs:
            programs[key] = fuse(trace(source), config)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace_decoder", lambda source: source)
        patch.setattr(export, "_fused", fused)
        yield
