"""BlockPool: exact ids, reference counts, names, and eviction order."""

from __future__ import annotations

from collections import Counter

import pytest
from camshaft.runtime.block_pool import BlockPool
from hypothesis import given, settings
from hypothesis import strategies as st


def test_ids_come_in_order_and_the_last_released_first() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert (pool.num_free, pool.num_used) == (1, 3)
    pool.release([1])
    assert pool.allocate(2) == [1, 3]
    assert pool.num_free == 0
    pool.check_integrity({0: 1, 1: 1, 2: 1, 3: 1})


def test_allocate_nothing() -> None:
    pool = BlockPool(1)
    assert pool.allocate(0) == []


def test_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0; allowed: at least 1"):
        BlockPool(0)


def test_allocating_too_much_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="3 blocks asked of 2"):
        BlockPool(2).allocate(3)


def test_a_named_block_is_found_after_release() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    assert pool.register(block, b"x")
    pool.release([block])
    assert (pool.num_used, pool.num_free, pool.num_cached) == (0, 2, 1)
    found = pool.lookup(b"x")
    assert found == block
    pool.acquire(found)
    assert (pool.ref_count(block), pool.num_free) == (1, 1)
    pool.acquire(found)
    assert pool.ref_count(block) == 2
    pool.check_integrity({block: 2})
    pool.release([block])
    assert pool.num_used == 1
    pool.release([block])
    pool.check_integrity({})


def test_plain_blocks_go_before_cached_ones_and_these_least_recently_released_first() -> None:
    """
    block      0    1    2    3
    name       a    b    -    c
    released   2nd  1st  3rd  4th      order of reuse: 2 (plain), 1, 0, 3
    """
    pool = BlockPool(4)
    pool.allocate(4)
    for block, name in ((0, b"a"), (1, b"b"), (3, b"c")):
        pool.register(block, name)
    pool.release([1, 0, 2, 3])
    assert pool.allocate(1) == [2]
    assert pool.num_cached == 3
    assert pool.allocate(1) == [1]
    assert pool.lookup(b"b") is None
    assert pool.num_evictions == 1
    assert pool.allocate(2) == [0, 3]
    assert pool.num_cached == 0
    pool.check_integrity({0: 1, 1: 1, 2: 1, 3: 1})


def test_a_hit_renews_a_block() -> None:
    pool = BlockPool(2)
    pool.allocate(2)
    pool.register(0, b"a")
    pool.register(1, b"b")
    pool.release([0, 1])
    pool.acquire(0)
    pool.release([0])
    assert pool.allocate(1) == [1]


def test_a_duplicate_stays_unnamed_and_is_plain_when_released() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    assert pool.register(0, b"same")
    assert not pool.register(1, b"same")
    assert pool.register(0, b"same")
    pool.release([0, 1])
    assert pool.lookup(b"same") == 0
    assert pool.allocate(1) == [1]
    pool.check_integrity({1: 1})


def test_reset_cache_forgets_and_refuses_while_in_use() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.register(0, b"a")
    with pytest.raises(ValueError, match="1 of 2 blocks are in use"):
        pool.reset_cache()
    pool.release([0])
    pool.reset_cache()
    assert (pool.lookup(b"a"), pool.num_cached, pool.num_free) == (None, 0, 2)
    pool.check_integrity({})


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="released while nobody holds it"):
        pool.release([0])
    with pytest.raises(AssertionError, match="named while nobody holds it"):
        pool.register(0, b"a")
    pool.allocate(1)
    pool.register(0, b"a")
    with pytest.raises(AssertionError, match="named twice"):
        pool.register(0, b"b")


@pytest.mark.parametrize(
    ("holders", "message"),
    [({}, "counts 1 holders, tables hold it 0"), ({0: 2}, "tables hold it 2 times"), ({0: 1, 9: 1}, r"blocks \[9\]")],
)
def test_check_integrity_sees_tables_that_disagree(holders: dict[int, int], message: str) -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(holders)


def test_check_integrity_sees_damage() -> None:
    def damaged() -> BlockPool:
        pool = BlockPool(3)
        pool.allocate(2)
        pool.register(0, b"a")
        pool.release([0])
        pool.check_integrity({1: 1})
        return pool

    pool = damaged()
    pool._plain_free.append(0)
    with pytest.raises(AssertionError, match="both free lists"):
        pool.check_integrity({1: 1})
    pool = damaged()
    pool._plain_free.append(1)
    with pytest.raises(AssertionError, match="block 1 has 1 holders and free is True"):
        pool.check_integrity({1: 1})
    pool = damaged()
    pool._block_of_hash[b"b"] = 1
    with pytest.raises(AssertionError, match="2 names for 1 named blocks"):
        pool.check_integrity({1: 1})
    pool = damaged()
    pool._block_of_hash.clear()
    with pytest.raises(AssertionError, match="not under its own hash"):
        pool.check_integrity({1: 1})


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("arnl"), st.integers(0, 9)), max_size=60))
def test_any_history_keeps_counts_and_names(num_blocks: int, operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks)
    held: list[int] = []
    for kind, number in operations:
        if kind == "a" and number % 3 <= pool.num_free:
            held += pool.allocate(number % 3)
        elif kind == "r" and held:
            pool.release([held.pop(number % len(held))])
        elif kind == "n" and held:
            block = held[number % len(held)]
            if pool._hashes[block] is None:
                pool.register(block, b"%d" % (number % 4))
        elif kind == "l":
            found = pool.lookup(b"%d" % (number % 4))
            if found is not None:
                pool.acquire(found)
                held.append(found)
        pool.check_integrity(Counter(held))
    pool.release(held)
    pool.check_integrity({})
    assert pool.num_used == 0
