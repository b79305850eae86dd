"""The header of an engine file: which version of TensorRT made it, and for which GPUs.

    0      4     8            16                24         28     32      36
    | magic | 0 | kind (u64) | length (u64)    | version   | magic | mask | ...      little endian
     "vtrt"                    of the whole      a.b.c.d             of compute
                               file                                  capabilities

The layout is not documented; it was read off engines of TensorRT-RTX 1.4 to 1.7. Full TensorRT was not at hand: a plan of its
own layout is refused as foreign.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..targets.base import LoweringError

MAGIC = b"vtrt"
SIZE = 36
"""Bytes of the part that is read."""

_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities by bit of the mask."""

_COMMON = 0b11110  # 8.0 to 12.0: what every release sets when it is given none (0x3e in 1.4, 0x7e in 1.6)


@dataclass(frozen=True)
class EngineHeader:
    """version: four numbers; capability_mask: as stored; num_bytes: of the engine, as stored."""

    version: tuple[int, int, int, int]
    capability_mask: int
    num_bytes: int

    @classmethod
    def parse(cls, data: bytes) -> EngineHeader:
        """Reads the header of a whole engine. Raises LoweringError for a file that is foreign, cut short or too long."""
        fix = "build the engine again"
        if len(data) < SIZE:
            raise LoweringError(f"an engine of {len(data)} bytes has no complete header ({SIZE} bytes); {fix}")
        if data[:4] != MAGIC or data[28:32] != MAGIC:
            raise LoweringError(f"not a TensorRT engine: it starts with {data[:4]!r}, not {MAGIC!r}; {fix}")
        (num_bytes,) = struct.unpack_from("<Q", data, 16)
        if num_bytes != len(data):
            raise LoweringError(f"the engine has {len(data)} bytes and its header says {num_bytes}: damaged; {fix}")
        (mask,) = struct.unpack_from("<I", data, 32)
        return cls((data[24], data[25], data[26], data[27]), mask, num_bytes)

    @property
    def version_text(self) -> str:
        """The version as TensorRT writes it: 1.6.1.120."""
        return ".".join(map(str, self.version))

    @property
    def portable(self) -> bool:
        """Whether it was built for no GPU in particular; such an engine also runs on some that the mask has no bit for (9.0)."""
        return self.capability_mask & _COMMON == _COMMON

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities that it was built for; a bit without a name reads "bit 7"."""
        bits = [bit for bit in range(32) if self.capability_mask >> bit & 1]
        return tuple(_CAPABILITIES[bit] if bit < len(_CAPABILITIES) else f"bit {bit}" for bit in bits)
