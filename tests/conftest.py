"""Test-wide set-up: one cache directory per run, no network, few threads, GPU tests skipped where there is none."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CAMSHAFT_CACHE", os.path.join(tempfile.gettempdir(), f"camshaft-tests-{os.getuid()}"))


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> Iterator[None]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Builds and exports of one config share its trace; see shared_traces.py."""
    import camshaft.export.whole.export  # noqa: F401  (it is imported lazily)
    from camshaft.export import build, whole
    from camshaft.models import huggingface
    from shared_traces import trace_decoder

    with pytest.MonkeyPatch.context() as patch:
        for module in (huggingface, build, whole.export):
            patch.setattr(module, "trace_decoder", trace_decoder)
        yield


def pytest_collection_finish() -> None:
    """What was imported stays until the end: the collector need not walk over it again and again while models are traced."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked or os.environ.get("TRITON_INTERPRET") == "1":  # Triton's interpreter runs kernels on the CPU
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
