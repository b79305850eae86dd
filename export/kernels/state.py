"""What the attention calls of an engine share on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_NUM_COUNTERS = 16_384


@dataclass
class AttentionState:
    """Scratch of the attention kernels of one stream; an executor owns one and says when a step begins.

    Of this step, shared by its layers: tiles, (kind of sequences, fewest rows, rows a tile) -> what `tiles_kernel` wrote;
    fresh_lens [S] int32, the rows of sequences without cached tokens and 0 for the others.
    """

    tiles: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    fresh_lens: Tensor | None = None
    _counters: Tensor | None = None

    def begin_step(self) -> None:
        """Forgets what belongs to one step's metadata."""
        self.tiles.clear()
        self.fresh_lens = None

    def counters(self, count: int, device: torch.device) -> Tensor:
        """At least `count` int32 zeros. Kernels that count in them set them back, so they are zeroed only once."""
        if self._counters is None or self._counters.shape[0] < count or self._counters.device != device:
            self._counters = torch.zeros(max(count, _NUM_COUNTERS), dtype=torch.int32, device=device)
        return self._counters
