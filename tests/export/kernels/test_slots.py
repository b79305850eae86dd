"""Keys and values copied from slot to slot: in all layers, of any dtype, also where what is read is overwritten."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.kernels.slots import SlotCopier


def make_caches(dtype: torch.dtype, device: str = "cpu", dim: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two layers of five blocks of four tokens, keys wider than values."""
    rng = torch.Generator().manual_seed(0)

    def cache(width: int) -> torch.Tensor:
        return torch.randn(5, 4, 2, width, generator=rng).to(dtype).to(device)

    return [(cache(dim), cache(dim - 2)) for _ in range(2)]


MOVES = [([5, 7, 8], [4, 5, 7]), ([3, 4, 17], [4, 3, 9]), ([], []), ([19], [0])]


@pytest.mark.parametrize("moves", MOVES, ids=["overlapping", "swapped", "none", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_copies_what_was_there_before(dtype: torch.dtype, moves: tuple[list[int], list[int]]) -> None:
    caches = make_caches(dtype)
    expected = [tuple(cache.float().flatten(0, 1).clone() for cache in pair) for pair in caches]
    SlotCopier(caches).copy(*moves)
    for got, before in zip(caches, expected):
        for cache, slots in zip(got, before):
            after = slots.clone()
            after[moves[1]] = slots[moves[0]]
            assert torch.equal(cache.float().flatten(0, 1), after)


@pytest.mark.parametrize(
    "sources,destinations,message",
    [
        ([1], [2, 3], "as many of each"),
        ([1, 2], [3, 3], "every destination once"),
        ([20], [1], "slot 20; allowed: 0..19"),
    ],
)
def test_what_is_refused(sources: list[int], destinations: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlotCopier(make_caches(torch.float32)).copy(sources, destinations)
