"""Weights from files to the device, several threads at once.

A mapped file comes in page by page, each with a fault, and a copy from memory that is not pinned goes through a buffer of the
driver's, one at a time. Here each thread reads a piece of a file into pinned memory while its piece before travels.
"""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.weights import Weight

_PIECE_BYTES = 16 << 20
"""Most bytes of a read; each thread has pinned memory for two."""
_THREADS = 8
_SWITCH_SECONDS = 5e-4
"""How soon a thread that wants the interpreter gets it meanwhile: engines are opened beside, which is mostly importing."""


class _Piece(NamedTuple):
    """Bytes of a file, and where they go."""

    path: Path
    offset: int
    into: Tensor
    """[bytes] uint8 on the device."""


def weights_on(weights: Mapping[str, Weight], device: torch.device) -> dict[str, Tensor]:
    """All weights on a device.

    On CUDA those that lie in files as they are (`Weight.stored_at`) are read by several threads, the others one by one. Raises
    ValueError for a file that ends before its tensor does.
    """
    on_gpu = device.type == "cuda"
    tensors = {
        name: _placed(weight, device) if on_gpu and weight.stored_at is not None else weight.to(device)
        for name, weight in weights.items()
    }
    if on_gpu:
        fill({name: tensors[name] for name, weight in weights.items() if weight.stored_at is not None}, weights)
    return tensors


def _placed(weight: Weight, device: torch.device) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=device)


def fill(tensors: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> None:
    """Reads the bytes of `weights` into contiguous tensors of the same shapes and dtypes. Raises ValueError as `weights_on`."""
    pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
    paths = set()
    for name, tensor in tensors.items():
        place = weights[name].stored_at
        assert place is not None, name
        paths.add(place.path)
        for begin in range(0, tensor.nbytes, _PIECE_BYTES):
            into = tensor.view(-1).view(torch.uint8)[begin : begin + _PIECE_BYTES]
            pieces.put(_Piece(place.path, place.offset + begin, into))
    if not paths:
        return
    device = next(iter(tensors.values())).device
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None
    count = min(_THREADS, os.cpu_count() or 1, pieces.qsize())
    with ExitStack() as stack, ThreadPoolExecutor(max(count, 1), "weights") as pool:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(_SWITCH_SECONDS)
        files = {path: stack.enter_context(open(path, "rb", buffering=0)).fileno() for path in paths}
        for job in [pool.submit(_read, pieces, files, device, current) for _ in range(count)]:
            job.result()


def _read(
    pieces: queue.SimpleQueue[_Piece],
    files: Mapping[Path, int],
    device: torch.device,
    current: torch.cuda.Stream | None,
) -> None:
    """A thread's work: pieces until there are none. current: the stream that the tensors were made on."""
    stream = None
    if current is not None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        buffers = [torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=stream is not None) for _ in range(2)]
        arrived = [torch.cuda.Event() if stream is not None else None for _ in buffers]
        turn = 0
        while True:
            try:
                piece = pieces.get_nowait()
            except queue.Empty:
                break
            buffer, event = buffers[turn], arrived[turn]
            if event is not None:
                event.synchronize()  # the piece before the last has left the buffer
            part = buffer[: piece.into.shape[0]]
            _read_exactly(files[piece.path], part.numpy().data, piece)
            piece.into.copy_(part, non_blocking=True)
            if event is not None:
                event.record(stream)
            turn = 1 - turn
    if stream is not None:
        stream.synchronize()


def _read_exactly(file: int, into: memoryview, piece: _Piece) -> None:
    """Fills `into` from a file. Raises ValueError if it ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], piece.offset + done)
        if not count:
            raise ValueError(f"{piece.path} ends at byte {piece.offset + done}, within a tensor; copy the engine again")
        done += count
