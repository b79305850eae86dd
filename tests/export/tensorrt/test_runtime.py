"""What TensorRtRuntime shares between engines, as far as it can be seen without a GPU: scratch memory and kept kernels."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from camshaft.export.tensorrt.runtime import TensorRtRuntime


class FakeCache:
    """A cache of compiled kernels whose content is bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


def make_runtime() -> TensorRtRuntime:
    runtime = object.__new__(TensorRtRuntime)
    runtime.device = torch.device("cpu")
    runtime._scratch, runtime._scratch_bytes, runtime._lock = {}, 0, threading.Lock()
    runtime._cache, runtime._read, runtime._stored = None, None, []
    return runtime


def test_each_stream_has_scratch_for_the_largest_engine_and_old_addresses_stay() -> None:
    runtime = make_runtime()
    runtime._scratch_bytes = 100
    first = runtime.scratch_address(1)
    assert runtime.scratch_address(1) == first != runtime.scratch_address(2)
    runtime._scratch_bytes = 1000
    larger = runtime.scratch_address(1)
    assert larger != first and runtime.scratch_address(1) == larger
    assert [piece.numel() for piece in runtime._scratch[1]] == [100, 1000]
    assert runtime._scratch[1][0].data_ptr() == first


def test_kernels_are_written_when_something_has_come_to_them(tmp_path: Path) -> None:
    runtime, file = make_runtime(), tmp_path / "folder" / "x.kernels"
    runtime.keep_kernels(file)
    assert not file.exists()  # nothing was compiled
    runtime._cache = FakeCache(b"one")
    runtime.keep_kernels(file)
    assert file.read_bytes() == b"one"
    runtime._read = file
    file.write_bytes(b"ONE")
    runtime.keep_kernels(file)
    assert file.read_bytes() == b"ONE"  # it was read from there, and nothing is new
    runtime._cache = FakeCache(b"one, two")
    runtime.keep_kernels(file)
    assert file.read_bytes() == b"one, two"
    runtime._read = None  # what lies there did not fit this machine: replaced, although it is longer
    file.write_bytes(b"of another machine")
    runtime.keep_kernels(file)
    assert [path.name for path in file.parent.iterdir()] == ["x.kernels"] and file.read_bytes() == b"one, two"
