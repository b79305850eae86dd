"""The blocks of one cache group: who holds them, what they contain, which one is reused next. Imports no torch.

  allocate()         release() to 0 holders
plain free  ---->  in use  ---->  plain free      when the content has no name (not full, or a duplicate)
                                  cached free     when register() has named the content
cached free ---->  in use         acquire(), found by its hash
cached free ---->  in use         allocate(), only when no plain block is left: the least recently released
                                  one forgets its content first
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping


class BlockPool:
    """Reference-counted block ids 0..num_blocks-1 with a content-addressed cache of the released ones.

    Every operation is O(1) per block. A hash names at most one block: a second block with equal content stays
    unnamed, and is plain when released.
    """

    def __init__(self, num_blocks: int) -> None:
        """Makes a pool of `num_blocks` free blocks; raises ValueError unless it is at least 1."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; allowed: at least 1; give the KV cache more memory")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        # A stack (most recently freed first, lowest id first at the start) beside the least recently used queue.
        self._plain_free = list(range(num_blocks - 1, -1, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, cached ones included: what allocate() can give."""
        return len(self._plain_free) + len(self._cached_free)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one request."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by hash, held or free."""
        return len(self._block_of_hash)

    def ref_count(self, block_id: int) -> int:
        """How many requests hold the block."""
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks with one holder each; the caller has checked that `num_free` suffices."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks asked of {self.num_free} free ones"
        return [self._take() for _ in range(num_blocks)]

    def _take(self) -> int:
        if self._plain_free:
            block_id = self._plain_free.pop()
        else:
            block_id, _ = self._cached_free.popitem(last=False)
            self._forget(block_id)
            self.num_evictions += 1
        self._ref_counts[block_id] = 1
        return block_id

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        assert block_hash is not None, f"block {block_id} is queued as cached without a hash"
        del self._block_of_hash[block_hash]
        self._hashes[block_id] = None

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with this content, or None; changes nothing, and the answer holds until the next allocate()."""
        return self._block_of_hash.get(block_hash)

    def acquire(self, block_id: int) -> None:
        """Add a holder to a block found by lookup(); a free one leaves the eviction queue."""
        if self._ref_counts[block_id] == 0:
            del self._cached_free[block_id]
        self._ref_counts[block_id] += 1

    def register(self, block_id: int, block_hash: bytes) -> bool:
        """Name a held block's content; False when another block has the name already (this one stays unnamed)."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is named while nobody holds it"
        if block_hash in self._block_of_hash:
            return self._block_of_hash[block_hash] == block_id
        assert self._hashes[block_id] is None, f"block {block_id} is named twice"
        self._block_of_hash[block_hash] = block_id
        self._hashes[block_id] = block_hash
        return True

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one holder of each block; those without holders become free, in the order given (evicted first)."""
        ref_counts = self._ref_counts
        for block_id in block_ids:
            assert ref_counts[block_id] > 0, f"block {block_id} is released while nobody holds it"
            ref_counts[block_id] -= 1
            if ref_counts[block_id] == 0:
                if self._hashes[block_id] is None:
                    self._plain_free.append(block_id)
                else:
                    self._cached_free[block_id] = None

    def reset_cache(self) -> None:
        """Forget all cached content (after weights change); raises ValueError while any block is held."""
        if self.num_used:
            raise ValueError(
                f"{self.num_used} of {self.num_blocks} blocks are in use; "
                f"the prefix cache is reset when no request runs: finish or abort them first"
            )
        for block_id in self._cached_free:
            self._forget(block_id)
        self._plain_free = list(range(self.num_blocks - 1, -1, -1))
        self._cached_free.clear()

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """Prove that counts, free lists and names agree; `holders` counts each block in all block tables.

        O(num_blocks). Raises AssertionError: a failure is a bug here or a table changed from outside.
        """
        plain, cached = set(self._plain_free), set(self._cached_free)
        assert len(plain) == len(self._plain_free), f"a block is free twice: {sorted(self._plain_free)}"
        assert not plain & cached, f"blocks are in both free lists: {sorted(plain & cached)}"
        foreign = [block_id for block_id in holders if not 0 <= block_id < self.num_blocks]
        assert not foreign, f"tables hold blocks {foreign} of a pool of {self.num_blocks}"
        for block_id, count in enumerate(self._ref_counts):
            held = holders.get(block_id, 0)
            assert count == held, f"block {block_id} counts {count} holders, tables hold it {held} times"
            is_free = block_id in plain or block_id in cached
            assert (count == 0) == is_free, f"block {block_id} has {count} holders and free is {is_free}"
            block_hash = self._hashes[block_id]
            if is_free:
                assert (block_hash is not None) == (block_id in cached), f"block {block_id} is in the wrong free list"
            if block_hash is not None:
                assert self._block_of_hash.get(block_hash) == block_id, f"block {block_id} is not under its own hash"
        num_named = sum(block_hash is not None for block_hash in self._hashes)
        assert num_named == len(self._block_of_hash), f"{len(self._block_of_hash)} names for {num_named} named blocks"
