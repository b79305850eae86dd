"""Distillations share traces, as builds do (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def distillations_traced_once(traced_once: None) -> Iterator[None]:
    from camshaft.export.distillation import distill
    from shared_traces import trace_decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "trace_decoder", trace_decoder)
        yield
