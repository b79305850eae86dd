"""KVCacheManager: exact block tables, prefix hits over several groups, and what a window gives back.

Layouts show logical blocks from the left; a number is a block id, `-1` the null block.
"""

from __future__ import annotations

import pytest
from camshaft.runtime.kv_cache import CacheGroup, KVCacheManager, PrefixMatch
from camshaft.runtime.request import NULL_BLOCK, Request
from camshaft.runtime.sampling_params import SamplingParams

N = NULL_BLOCK
CHUNK = 64


def full(num_blocks: int = 8, block_size: int = 4) -> CacheGroup:
    return CacheGroup(num_blocks=num_blocks, block_size=block_size)


def windowed(num_blocks: int, block_size: int, window: int) -> CacheGroup:
    return CacheGroup(num_blocks=num_blocks, block_size=block_size, window=window)


def request(name: str, tokens: int | list[int], **fields: object) -> Request:
    prompt = list(range(tokens)) if isinstance(tokens, int) else tokens
    params = fields.pop("params", SamplingParams())
    return Request(name, prompt, params, **fields)  # type: ignore[arg-type]


def compute(kv: KVCacheManager, item: Request, num_tokens: int) -> None:
    """Pretend that the request's first num_tokens tokens are computed."""
    item.num_computed_tokens = num_tokens
    kv.advance(item)
    kv.check_integrity()


def run(kv: KVCacheManager, item: Request) -> PrefixMatch:
    """Admit the request and compute all its tokens in one chunk."""
    match = kv.match_prefix(item)
    item.num_computed_tokens = match.num_tokens
    assert kv.admit(item, match, item.num_tokens, CHUNK)
    compute(kv, item, item.num_tokens)
    return match


def test_a_request_grows_block_by_block() -> None:
    kv = KVCacheManager([full(4)])
    a = request("a", 6)
    assert kv.match_prefix(a) == (0, ([],))
    assert kv.admit(a, kv.match_prefix(a), 6, CHUNK)
    assert a.block_ids == [[0, 1]]
    assert a.kv_capacity == 8
    assert kv.allocate(a, 8)
    assert a.block_ids == [[0, 1]]
    assert kv.allocate(a, 9)
    assert a.block_ids == [[0, 1, 2]]
    assert not kv.allocate(a, 17)
    assert a.block_ids == [[0, 1, 2]]
    kv.free(a)
    assert a.block_ids == [[]]
    assert kv.pools[0].num_used == 0
    kv.check_integrity()


def test_groups_are_extended_all_or_none() -> None:
    kv = KVCacheManager([full(8), full(2, 4)])
    a = request("a", 4)
    run(kv, a)
    assert not kv.allocate(a, 12)
    assert a.block_ids == [[0], [0]]
    assert kv.pools[0].num_free == 7


def test_an_equal_prefix_shares_full_blocks() -> None:
    """
    a   0 1 2 3 | 4 5 6 7 | 8 9          blocks 0 1 2
    b   0 1 2 3 | 4 5 6 7 | 8 9 50       blocks 0 1 3: block 2 is not full, so it is not shared
    """
    kv = KVCacheManager([full()])
    a, b = request("a", 10), request("b", [*range(10), 50])
    run(kv, a)
    assert run(kv, b) == (8, ([0, 1],))
    assert (a.block_ids, b.block_ids) == ([[0, 1, 2]], [[0, 1, 3]])
    assert kv.pools[0].ref_count(0) == 2
    kv.free(a)
    kv.free(b)
    assert (kv.pools[0].num_used, kv.pools[0].num_cached) == (0, 2)


def test_one_token_is_always_left_to_compute() -> None:
    """The same prompt of two full blocks again: its second block is computed anew, and stays a nameless duplicate."""
    kv = KVCacheManager([full()])
    a, b = request("a", 8), request("b", 8)
    run(kv, a)
    assert run(kv, b).num_tokens == 4
    assert b.block_ids == [[0, 2]]
    kv.free(a)
    kv.free(b)
    assert kv.pools[0].num_cached == 2


def test_only_computed_blocks_are_found() -> None:
    kv = KVCacheManager([full()])
    a, b = request("a", 13), request("b", 13)
    assert kv.admit(a, kv.match_prefix(a), 13, CHUNK)
    compute(kv, a, 7)
    assert kv.match_prefix(b).num_tokens == 4
    assert a.kv_next_event == 8
    compute(kv, a, 8)
    assert kv.match_prefix(b).num_tokens == 8


def test_output_tokens_are_shared_too() -> None:
    kv = KVCacheManager([full()])
    a = request("a", 3)
    a.max_total_tokens = 99
    run(kv, a)
    a.append_output([7, 8])
    compute(kv, a, 4)
    assert kv.match_prefix(request("b", [0, 1, 2, 7, 9])) == (4, ([0],))


@pytest.mark.parametrize(
    ("fields", "num_hit"),
    [
        ({}, 8),
        ({"lora_id": "x"}, 0),
        ({"lora_id": ""}, 0),
        ({"cache_salt": "x"}, 0),
        ({"multimodal": object()}, 0),
        ({"params": SamplingParams(prompt_logprobs=0)}, 0),
    ],
)
def test_what_else_changes_the_content(fields: dict[str, object], num_hit: int) -> None:
    kv = KVCacheManager([full()])
    run(kv, request("a", 9))
    assert kv.match_prefix(request("b", 9, **fields)).num_tokens == num_hit


def test_equal_salts_share_and_salted_media_may() -> None:
    kv = KVCacheManager([full()])
    run(kv, request("a", 9, cache_salt="s", multimodal=object()))
    assert kv.match_prefix(request("b", 9, cache_salt="s")).num_tokens == 8


def test_media_without_salt_are_not_named() -> None:
    kv = KVCacheManager([full()])
    run(kv, request("a", 9, multimodal=object()))
    assert kv.pools[0].num_cached == 0


def test_prefix_cache_off() -> None:
    kv = KVCacheManager([full()], enable_prefix_cache=False)
    a = request("a", 9)
    run(kv, a)
    assert kv.pools[0].num_cached == 0
    assert a.block_hashes == {}
    assert kv.match_prefix(request("b", 9)).num_tokens == 0


def test_a_prefix_loses_its_end_first() -> None:
    """
    a   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12      blocks 0 1 2 3 of 4; freed: 3 is plain, then 2, 1, 0 are evicted
    """
    kv = KVCacheManager([full(4)])
    a = request("a", 13)
    run(kv, a)
    kv.free(a)
    b = request("b", [90, 91, 92, 93, 94])
    run(kv, b)
    assert b.block_ids == [[3, 2]]
    assert kv.match_prefix(request("c", 13)) == (8, ([0, 1],))


def test_matched_free_blocks_are_not_counted_as_room() -> None:
    """Two of three blocks are cached and free; a request that shares both needs two more, and one is there."""
    kv = KVCacheManager([full(3)])
    a = request("a", 8)
    run(kv, a)
    kv.free(a)
    b = request("b", 13)
    match = kv.match_prefix(b)
    assert match == (8, ([0, 1],))
    assert not kv.admit(b, match, 12, CHUNK)
    assert kv.pools[0].num_used == 0
    assert kv.admit(request("c", 12), match, 12, CHUNK)


def test_window_blocks_go_back_as_computation_advances() -> None:
    """
    window 4, block size 2; token i attends i-3 .. i

    computed     table              the next token attends
    0            [ 0  1  2]         0            (blocks for a chunk of five)
    5            [-1  1  2]         2 .. 5
    6            [-1  1  2]         3 .. 6
    8            [-1 -1  2  0]      5 .. 8       (block 0 was taken again)
    """
    kv = KVCacheManager([windowed(3, 2, 4)], enable_prefix_cache=False)
    a = request("a", 8)
    assert kv.admit(a, kv.match_prefix(a), 5, 2)
    assert a.block_ids == [[0, 1, 2]]
    compute(kv, a, 5)
    assert a.block_ids == [[N, 1, 2]]
    compute(kv, a, 6)
    assert a.block_ids == [[N, 1, 2]]
    assert a.kv_next_event == 7
    assert kv.allocate(a, 8)
    assert a.block_ids == [[N, 1, 2, 0]]
    compute(kv, a, 8)
    assert a.block_ids == [[N, N, 2, 0]]
    kv.free(a)
    kv.check_integrity()
    assert kv.pools[0].num_used == 0


@pytest.mark.parametrize(
    ("window", "num_tokens", "chunk", "num_blocks"),
    [(0, 17, 1, 5), (0, 16, 99, 4), (6, 99, 4, 3), (6, 5, 4, 2), (1, 99, 1, 1), (4, 99, 1, 2), (6, 99, 1, 3)],
)
def test_most_blocks_held(window: int, num_tokens: int, chunk: int, num_blocks: int) -> None:
    """Block size 4; the bound is the worst case over all alignments, which the loop below goes through."""
    group = windowed(99, 4, window)
    bound = group.max_blocks_held(num_tokens, chunk)
    worst = 0
    for start in range(num_tokens):
        end = min(start + chunk, num_tokens)
        worst = max(worst, -(-end // 4) - group.num_behind_window(start))
    assert bound == worst == num_blocks


def test_a_window_group_needs_only_the_blocks_before_the_next_token() -> None:
    """
    full, block size 2     [ 0  1  2  3  4 ]    all of them
    window 3               [-1 -1 -1  3  4 ]    a hit of 8 attends 6 7: block 3; a hit of 10 would need block 4
    """
    kv = KVCacheManager([full(8, 2), windowed(8, 2, 3)])
    a = request("a", 11)
    run(kv, a)
    assert a.block_ids == [[0, 1, 2, 3, 4, 5], [N, N, N, N, 4, 5]]
    b = request("b", 10)
    assert kv.match_prefix(b) == (8, ([0, 1, 2, 3], [N, N, N, 3]))
    c = request("c", 11)
    assert kv.match_prefix(c) == (10, ([0, 1, 2, 3, 4], [N, N, N, N, 4]))
    run(kv, b)
    assert b.block_ids == [[0, 1, 2, 3, 6], [N, N, N, N, 6]]


def test_the_hit_shrinks_to_what_all_groups_have() -> None:
    """
    window 3's blocks 4 and 3 were reused:   [x  1  2  x  x]
    a hit of 10 needs block 4, of 8 block 3, of 6 block 2 -> 6 tokens
    """
    kv = KVCacheManager([full(16, 2), windowed(5, 2, 3)])
    a = request("a", 10)
    run(kv, a)
    kv.free(a)
    pool = kv.pools[1]
    held = {tuple(kv._hashes(a, 2, 10)).index(pool._hashes[block]): block for block in range(5)}  # type: ignore[arg-type]
    for logical in (0, 3, 4):
        block = held[logical]
        del pool._cached_free[block]
        pool._forget(block)
        pool._plain_free.append(block)
    kv.check_integrity()
    assert kv.match_prefix(request("b", 11)) == (6, ([0, 1, 2], [N, N, held[2]]))


def test_hits_end_on_a_boundary_of_all_block_sizes() -> None:
    """Block sizes 4 and 6: hits are multiples of 12."""
    kv = KVCacheManager([full(16, 4), full(16, 6)])
    run(kv, request("a", 40))
    assert kv.match_prefix(request("b", 24)) == (12, ([0, 1, 2], [0, 1]))
    assert kv.match_prefix(request("c", 25)) == (24, ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3]))


def test_a_window_of_one_needs_no_blocks_for_a_hit() -> None:
    kv = KVCacheManager([full(8, 2), windowed(8, 2, 1)])
    run(kv, request("a", 5))
    assert kv.match_prefix(request("b", 5)) == (4, ([0, 1], [N, N]))


def test_hashes_are_chained() -> None:
    """Equal second blocks after different first ones are different content."""
    kv = KVCacheManager([full(8, 2)])
    run(kv, request("a", [1, 2, 3, 4, 5]))
    assert kv.match_prefix(request("b", [9, 2, 3, 4, 5])).num_tokens == 0
    a, b = request("a", [1, 2, 3, 4]), request("b", [9, 2, 3, 4])
    assert kv._hashes(a, 2, 4)[1] != kv._hashes(b, 2, 4)[1]
    assert len(kv._hashes(a, 2, 4)[1]) == 32


def test_reset_prefix_cache() -> None:
    kv = KVCacheManager([full()])
    a = request("a", 9)
    run(kv, a)
    with pytest.raises(ValueError, match="blocks are in use"):
        kv.reset_prefix_cache()
    kv.free(a)
    kv.reset_prefix_cache()
    assert kv.match_prefix(request("b", 9)).num_tokens == 0


@pytest.mark.parametrize("damage", ["repeat", "null", "foreign", "committed"])
def test_check_integrity_sees_a_damaged_table(damage: str) -> None:
    kv = KVCacheManager([full()])
    a = request("a", 9)
    run(kv, a)
    if damage == "repeat":
        a.block_ids[0][1] = 0
    elif damage == "null":
        a.block_ids[0][1] = N
    elif damage == "foreign":
        a.block_ids[0][1] = 7
    else:
        a.kv_committed[0] = 3
    with pytest.raises(AssertionError):
        kv.check_integrity()


@pytest.mark.parametrize("fields", [{"num_blocks": 0}, {"block_size": 0}, {"window": -1}])
def test_bad_groups_are_refused(fields: dict[str, int]) -> None:
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"CacheGroup.{name} is {value}; allowed: integers >="):
        CacheGroup(**{"num_blocks": 4, "block_size": 4, **fields})


def test_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="groups is empty"):
        KVCacheManager([])
