"""The engine header: read off real engines, refused for anything else."""

from __future__ import annotations

import struct

import pytest
import torch
from camshaft.export.targets.base import LoweringError
from camshaft.export.tensorrt.header import SIZE, EngineHeader


def made(mask: int = 0x7E, num_bytes: int = 64) -> bytes:
    """A file with a header as TensorRT-RTX 1.6.1.120 writes it."""
    start = b"vtrt" + struct.pack("<IQQ", 0, 2, num_bytes) + bytes((1, 6, 1, 120)) + b"vtrt" + struct.pack("<I", mask)
    return start + bytes(num_bytes - len(start))


def test_fields() -> None:
    header = EngineHeader.parse(made(mask=0b11000))
    assert (header.version, header.version_text, header.num_bytes) == ((1, 6, 1, 120), "1.6.1.120", 64)
    assert header.capabilities == ("8.9", "12.0") and not header.portable


@pytest.mark.parametrize("mask", [0x3E, 0x7E])
def test_portable(mask: int) -> None:
    header = EngineHeader.parse(made(mask=mask))
    assert header.portable and header.capabilities[:5] == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert ("bit 6" in header.capabilities) == (mask == 0x7E)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "of 0 bytes has no complete header"), (made()[: SIZE - 1], "no complete header"),
        (made()[:-1], "has 63 bytes and its header says 64"), (made() + b"x", "has 65 bytes"),
        (b"ftrt" + made()[4:], "not a TensorRT engine: it starts with b'ftrt'"), (b"\x7fELF" + bytes(60), "not a TensorRT engine"),
        (made()[:28] + b"xxxx" + made()[32:], "not a TensorRT engine"),
    ],
)  # fmt: skip
def test_damaged(data: bytes, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        EngineHeader.parse(data)


CAPABILITIES = [(), ("7.5",), ("8.0",), ("8.6",), ("8.9",), ("12.0",), ("12.1",), ("8.6", "12.0")]


@pytest.mark.parametrize("capabilities", CAPABILITIES, ids=str)
def test_real_engines(capabilities: tuple[str, ...]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from camshaft.export.tensorrt.library import find_library
    from camshaft.export.tensorrt.network import new_network, serialize

    library = find_library("tensorrt_rtx")
    maker, builder = new_network(library)
    builder.output(builder.unary("NEG", builder.input("x", torch.float32, (4, 4))), "y")
    data = serialize(maker, builder, capabilities).data
    header = EngineHeader.parse(data)
    assert header.version_text == library.version and header.num_bytes == len(data)
    assert header.capabilities == capabilities if capabilities else header.portable
