"""Packed transfers: layout, alignment, and how long what they give stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from camshaft.runtime.packing import HostCopy, PackedTransfer, upload

CPU = torch.device("cpu")


def test_arrays_arrive_with_their_shapes_and_dtypes() -> None:
    transfer = PackedTransfer(CPU)
    specs = [((5,), torch.int64), ((0,), torch.int64), ((3, 7), torch.int32), ((2,), torch.int32)]
    for _ in range(3):
        arrays = transfer.open(specs)
        expected = []
        for array, (shape, dtype) in zip(arrays, specs):
            assert array.shape == shape and array.dtype == (np.int64 if dtype == torch.int64 else np.int32)
            array[...] = np.random.default_rng(0).integers(-9, 99, shape)
            expected.append(array.tolist())
        tensors = transfer.send()
        for tensor, values, (shape, dtype) in zip(tensors, expected, specs):
            assert tensor.dtype == dtype and tensor.shape == shape and tensor.tolist() == values
            assert tensor.storage_offset() * dtype.itemsize % 128 == 0 and tensor.is_contiguous()


def test_what_was_sent_stays_until_the_turn_after_the_next() -> None:
    transfer = PackedTransfer(CPU)
    sent = []
    for number in range(2):
        transfer.open([((4,), torch.int64)])[0][:] = number
        sent.append(transfer.send()[0])
    assert [tensor.tolist() for tensor in sent] == [[0] * 4, [1] * 4]
    transfer.open([((100_000,), torch.int32)])[0][:] = 7
    assert sent[1].tolist() == [1] * 4 and transfer.send()[0].sum() == 700_000


def test_small_copies() -> None:
    array = np.arange(6).reshape(2, 3)
    tensor = upload(array, CPU)
    values = HostCopy([tensor, tensor[:, 0] > 1], CPU).wait()
    assert values[0].tolist() == array.tolist() and values[1].tolist() == [False, True]
    assert HostCopy([], CPU).wait() == []


def test_a_copy_of_nothing_still_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that samples nothing has no values; the host may not run ahead of it all the same."""
    calls = []

    class Event:
        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    copy = HostCopy([], torch.device("cuda"))
    assert calls == ["record"]
    assert copy.wait() == [] and calls == ["record", "synchronize"]
