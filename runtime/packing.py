"""Host arrays that go to the device without making the host wait: many in one transfer, or one at a time.

A step's index arrays are written side by side into one pinned buffer and travel together:

    | token_ids  i64 | positions  i64 | ... | query_start  i32 | seq_lens  i32 | block tables  i32 |     each 128-byte aligned

The transfer runs on a stream of its own, so it is over before the step in front of it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGN_BYTES = 128
_NUMPY: dict[torch.dtype, Any] = {torch.int64: np.dtype(np.int64), torch.int32: np.dtype(np.int32)}

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape, and int64 or int32."""


class _Buffer:
    """Pinned host memory, and the event after which it may be written again."""

    def __init__(self) -> None:
        self.host = torch.empty(0, dtype=torch.uint8)
        self.array: npt.NDArray[np.uint8] = self.host.numpy()
        self.copied: torch.cuda.Event | None = None


class PackedTransfer:
    """Two host buffers in turn: `open` gives arrays to write into, `send` brings them to the device.

    On the CPU the tensors are the buffer itself, which is written again two turns later; on CUDA they own their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = (_Buffer(), _Buffer())
        self._turn = 0
        self._layout: list[tuple[int, int, Spec]] = []
        self._end = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def open(self, specs: Sequence[Spec]) -> list[npt.NDArray[Any]]:
        """Uninitialised arrays of these shapes, good until `send`; waits until their buffer's last transfer is over."""
        self._layout, end = [], 0
        for shape, dtype in specs:
            count = 1
            for size in shape:
                count *= size
            self._layout.append((end, count, (shape, dtype)))
            end += -(-count * dtype.itemsize // _ALIGN_BYTES) * _ALIGN_BYTES
        self._end = end
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if buffer.host.numel() < end:
            buffer.host = torch.empty(max(2 * end, 4096), dtype=torch.uint8, pin_memory=self._stream is not None)
            buffer.array = buffer.host.numpy()
        return [
            buffer.array[first : first + count * dtype.itemsize].view(_NUMPY[dtype]).reshape(shape)
            for first, count, (shape, dtype) in self._layout
        ]

    def send(self) -> list[torch.Tensor]:
        """The arrays on the device, in one transfer; work on the current stream waits for it, the host does not."""
        buffer = self._buffers[self._turn]
        packed = buffer.host[: self._end]
        if self._stream is not None:
            packed = self._copy(packed, buffer, self._stream)
        whole = {torch.int64: packed.view(torch.int64), torch.int32: packed.view(torch.int32)}
        tensors = []
        for first, count, (shape, dtype) in self._layout:
            begin = first // dtype.itemsize
            tensor = whole[dtype][begin : begin + count]
            tensors.append(tensor if len(shape) == 1 else tensor.view(shape))
        return tensors

    def _copy(self, host: torch.Tensor, buffer: _Buffer, stream: torch.cuda.Stream) -> torch.Tensor:
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(stream):
            packed = host.to(self._device, non_blocking=True)
            buffer.copied = buffer.copied or torch.cuda.Event()
            buffer.copied.record(stream)
        current.wait_event(buffer.copied)
        # Made on one stream, read on another: its memory may go to a later transfer only when the reader is done.
        packed.record_stream(current)
        return packed


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small array on the device. The host does not wait, as it would for memory that is not pinned."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class HostCopy:
    """Copies of tensors of `device` that come to pinned host memory while the host goes on.

    The tensors may be overwritten by work launched afterwards on the same stream. There may be none of them: what `wait`
    waits for is all that was launched before, so that a host that waits for every step is never far ahead of the device.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensors = list(tensors)
            return
        self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, tensor in zip(self._tensors, tensors):
            host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[npt.NDArray[Any]]:
        """The values, once the device has come so far; raises what the device's work raised."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]
