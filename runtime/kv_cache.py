"""Block tables of the running requests over one block pool per cache group, and the prefix cache. Imports no torch.

A model's layers fall into groups that share a block table: full attention, and one group per window width.
Block tables of a request with 10 computed tokens, block size 2, and a window of 4:

    logical block       0      1      2      3      4
    positions          0 1    2 3    4 5    6 7    8 9   (next: 10)
    full group        [ 7      8      9      3      4 ]
    window group      [-1     -1     -1      0      1 ]   token 10 attends 7..10, so blocks 0..2 went back

A block's name is a hash chained over all tokens up to its end, so equal names mean equal keys and values. The chain
is 256 bit BLAKE2b (Aumasson et al. 2013): collisions are out of reach, so token ids are not compared again.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from .block_pool import BlockPool
from .request import NULL_BLOCK, Request

_NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """The blocks of the layers that share a block table; raises ValueError on sizes below the least allowed."""

    num_blocks: int
    """Blocks in the pool, >= 1."""
    block_size: int
    """Tokens per block, >= 1."""
    window: int = 0
    """0: full attention; w: token i attends token j when i - w < j <= i."""

    def __post_init__(self) -> None:
        for name, least in (("num_blocks", 1), ("block_size", 1), ("window", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"CacheGroup.{name} is {value}; allowed: integers >= {least}")

    def num_behind_window(self, num_computed_tokens: int) -> int:
        """Leading logical blocks that no token from position num_computed_tokens on attends."""
        return max(0, num_computed_tokens - self.window + 1) // self.block_size if self.window else 0

    def max_blocks_held(self, num_tokens: int, max_chunk_tokens: int) -> int:
        """Most blocks a request holds at once while it grows to num_tokens in steps of at most max_chunk_tokens.

        A window group holds the window - 1 tokens before the chunk, the chunk, and what shares their end blocks:

            | . . a a | a a a c | c c c . |     window 6: a = 5 tokens before, c = a chunk of 4, block size 4
        """
        num_blocks = -(-num_tokens // self.block_size)
        if not self.window:
            return num_blocks
        span = self.window - 1 + min(max_chunk_tokens, num_tokens)
        return min(num_blocks, (span + 2 * self.block_size - 2) // self.block_size)


class PrefixMatch(NamedTuple):
    """What the cache has of a request's prefix; holds no references, so it is good until blocks next move."""

    num_tokens: int
    """Tokens that need not be computed; a multiple of every group's block size, less than the request's tokens."""
    block_ids: tuple[list[int], ...]
    """Block table per group for these tokens, NULL_BLOCK where the window no longer reaches."""


class KVCacheManager:
    """Gives requests their blocks, names the full ones, and finds them again for equal prefixes.

    The life of a request here: match_prefix -> admit -> (allocate -> advance)* -> free. All methods keep
    `request.block_ids` and the kv_ fields; none touches `num_computed_tokens`.
    """

    def __init__(self, groups: Sequence[CacheGroup], *, enable_prefix_cache: bool = True) -> None:
        """One pool per group; raises ValueError when there is no group."""
        if not groups:
            raise ValueError("groups is empty; allowed: at least one CacheGroup")
        self.groups = tuple(groups)
        self.enable_prefix_cache = enable_prefix_cache
        self.pools = tuple(BlockPool(group.num_blocks) for group in groups)
        self._block_sizes = tuple(group.block_size for group in groups)
        # A hit ends on a block boundary of every group.
        self._alignment = math.lcm(*self._block_sizes)
        self._full = [i for i, group in enumerate(groups) if not group.window]
        self._windowed = [i for i, group in enumerate(groups) if group.window]
        self._requests: dict[str, Request] = {}

    def blocks_needed(self, num_tokens: int, max_chunk_tokens: int) -> tuple[int, ...]:
        """Per group, the most blocks one request holds while growing to num_tokens (see CacheGroup)."""
        return tuple(group.max_blocks_held(num_tokens, max_chunk_tokens) for group in self.groups)

    @property
    def admitted_requests(self) -> tuple[Request, ...]:
        """The requests that hold block tables."""
        return tuple(self._requests.values())

    # --- prefix cache -------------------------------------------------------------------------------------------

    def match_prefix(self, request: Request) -> PrefixMatch:
        """The longest prefix that every group has; leaves at least one token to compute. Changes no block.

        A full group needs all blocks of the prefix, a window group those that the token after it attends.
        """
        empty = PrefixMatch(0, tuple([] for _ in self.groups))
        if not self.enable_prefix_cache or not request.uses_prefix_cache:
            return empty
        most = request.num_tokens - 1
        if request.needs_prompt_logits:
            most = min(most, request.first_logit_row)
        length = most // self._alignment * self._alignment
        for index in self._full:
            length = self._longest_full_hit(request, index, length)
        length = self._longest_window_hit(request, length)
        if length == 0:
            return empty
        tables = []
        for group, pool in zip(self.groups, self.pools):
            hashes = self._hashes(request, group.block_size, length)
            first = group.num_behind_window(length)
            found = [pool.lookup(hashes[i]) for i in range(first, length // group.block_size)]
            tables.append([NULL_BLOCK] * first + [block_id for block_id in found if block_id is not None])
            assert len(tables[-1]) * group.block_size == length, "the prefix cache changed during a match"
        return PrefixMatch(length, tuple(tables))

    def _longest_full_hit(self, request: Request, index: int, limit: int) -> int:
        block_size, pool = self._block_sizes[index], self.pools[index]
        num_hit = 0
        for block_hash in self._hashes(request, block_size, limit)[: limit // block_size]:
            if pool.lookup(block_hash) is None:
                break
            num_hit += 1
        return num_hit * block_size // self._alignment * self._alignment

    def _longest_window_hit(self, request: Request, limit: int) -> int:
        """Shorten `limit` until all window groups have what the next token attends.

        A block missing for one length is missing for all shorter ones that end behind it, so the next candidate
        ends where that block begins: blocks are looked up at most once per group and candidate.
        """
        length = limit
        while length:
            missing = [self._last_missing(request, index, length) for index in self._windowed]
            shortest = min((end for end in missing if end is not None), default=length)
            if shortest == length:
                return length
            length = shortest // self._alignment * self._alignment
        return 0

    def _last_missing(self, request: Request, index: int, length: int) -> int | None:
        """Begin, in tokens, of the last block missing for a hit of `length` tokens; None when all are there."""
        group, pool = self.groups[index], self.pools[index]
        hashes = self._hashes(request, group.block_size, length)
        for i in range(length // group.block_size - 1, group.num_behind_window(length) - 1, -1):
            if pool.lookup(hashes[i]) is None:
                return i * group.block_size
        return None

    def _hashes(self, request: Request, block_size: int, num_tokens: int) -> list[bytes]:
        """Chained hashes of at least the full blocks among the first num_tokens tokens, kept in the request."""
        hashes = request.block_hashes.setdefault(block_size, [])
        num_blocks = num_tokens // block_size
        if len(hashes) < num_blocks:
            tokens = request.all_token_ids
            parent = hashes[-1] if hashes else _root_hash(request)
            for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
                content = array("q", tokens[start : start + block_size]).tobytes()
                parent = blake2b(parent + content, digest_size=32).digest()
                hashes.append(parent)
        return hashes

    # --- blocks of a request ------------------------------------------------------------------------------------

    def admit(self, request: Request, match: PrefixMatch, num_tokens: int, max_chunk_tokens: int) -> bool:
        """Start a request on `match`, with blocks for its first num_tokens; False (nothing changed) if they lack.

        Demands that the blocks of all its present tokens be free, though only those of num_tokens are taken: a
        request that starts without room for its prompt would be preempted before it yields a token.
        """
        assert request.request_id not in self._requests, f"request {request.request_id!r} is admitted twice"
        for group, pool, table in zip(self.groups, self.pools, match.block_ids):
            num_null = group.num_behind_window(match.num_tokens)
            num_blocks = -(-request.num_tokens // group.block_size) - num_null
            num_held = min(num_blocks, group.max_blocks_held(request.num_tokens, max_chunk_tokens))
            num_shared = sum(pool.ref_count(block_id) > 0 for block_id in table[num_null:])
            if num_held - num_shared > pool.num_free:
                return False
        for pool, table in zip(self.pools, match.block_ids):
            for block_id in table:
                if block_id != NULL_BLOCK:
                    pool.acquire(block_id)
        request.block_ids = [list(table) for table in match.block_ids]
        request.kv_committed = [len(table) for table in match.block_ids]
        request.kv_dropped = [group.num_behind_window(match.num_tokens) for group in self.groups]
        self._requests[request.request_id] = request
        self._set_marks(request)
        allocated = self.allocate(request, num_tokens)
        assert allocated, "blocks counted as free were not"
        return True

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Extend the block tables to num_tokens tokens in all groups; False (nothing changed) if blocks lack."""
        if num_tokens <= request.kv_capacity:
            return True
        missing = []
        for block_size, pool, table in zip(self._block_sizes, self.pools, request.block_ids):
            num_missing = -(-num_tokens // block_size) - len(table)
            if num_missing > pool.num_free:
                return False
            missing.append(num_missing)
        for num_missing, pool, table in zip(missing, self.pools, request.block_ids):
            if num_missing > 0:
                table.extend(pool.allocate(num_missing))
        request.kv_capacity = min(
            len(table) * block_size for table, block_size in zip(request.block_ids, self._block_sizes)
        )
        return True

    def advance(self, request: Request) -> None:
        """Follow num_computed_tokens: commit() and free_behind_window(); needed only from kv_next_event on."""
        self.commit(request)
        self.free_behind_window(request)
        self._set_marks(request)

    def commit(self, request: Request) -> None:
        """Name the full blocks whose tokens are all computed, so that others can share them."""
        if not self.enable_prefix_cache or not request.uses_prefix_cache:
            return
        for index, (block_size, pool) in enumerate(zip(self._block_sizes, self.pools)):
            num_full = request.num_computed_tokens // block_size
            if num_full > request.kv_committed[index]:
                hashes = self._hashes(request, block_size, request.num_computed_tokens)
                for i in range(request.kv_committed[index], num_full):
                    pool.register(request.block_ids[index][i], hashes[i])
                request.kv_committed[index] = num_full

    def free_behind_window(self, request: Request) -> None:
        """Give back the blocks that no later token attends; call commit() first, or their content is lost."""
        for index in self._windowed:
            first, end = request.kv_dropped[index], self.groups[index].num_behind_window(request.num_computed_tokens)
            if end > first:
                table = request.block_ids[index]
                self.pools[index].release(table[first:end])
                table[first:end] = [NULL_BLOCK] * (end - first)
                request.kv_dropped[index] = end

    def free(self, request: Request) -> None:
        """Give back all blocks of a request; named ones stay findable until reused, a prefix's end first."""
        del self._requests[request.request_id]
        for pool, table, first in zip(self.pools, request.block_ids, request.kv_dropped):
            pool.release(reversed(table[first:]))
        request.block_ids = [[] for _ in self.groups]
        request.kv_committed = [0] * len(self.groups)
        request.kv_dropped = [0] * len(self.groups)
        request.kv_capacity = request.kv_next_event = 0

    def reset_prefix_cache(self) -> None:
        """Forget all cached content (after weights change); raises ValueError while blocks are in use."""
        for pool in self.pools:
            pool.reset_cache()

    def _set_marks(self, request: Request) -> None:
        """Note the computed length at which advance() next has something to do."""
        mark = _NEVER
        if self.enable_prefix_cache and request.uses_prefix_cache:
            mark = min((n + 1) * size for n, size in zip(request.kv_committed, self._block_sizes))
        for index in self._windowed:
            group = self.groups[index]
            mark = min(mark, (request.kv_dropped[index] + 1) * group.block_size + group.window - 1)
        request.kv_next_event = mark

    def check_integrity(self) -> None:
        """Prove that the block tables of all admitted requests and the pools agree; raises AssertionError.

        O(blocks + table entries): for tests, and for a server that is idle.
        """
        for index, (group, pool) in enumerate(zip(self.groups, self.pools)):
            holders: Counter[int] = Counter()
            for request in self._requests.values():
                table, dropped = request.block_ids[index], request.kv_dropped[index]
                name = f"request {request.request_id!r}, group {index}"
                assert table[:dropped] == [NULL_BLOCK] * dropped, f"{name}: {table} begins without {dropped} nulls"
                assert NULL_BLOCK not in table[dropped:], f"{name}: {table} has a null block inside the window"
                behind = group.num_behind_window(request.num_computed_tokens)
                assert dropped == behind, f"{name}: {dropped} blocks dropped, {behind} are behind the window"
                assert len(set(table[dropped:])) == len(table) - dropped, f"{name}: {table} repeats a block"
                num_tokens = len(table) * group.block_size
                assert request.num_computed_tokens <= num_tokens, f"{name}: more computed than {num_tokens} slots"
                assert request.kv_capacity <= num_tokens, f"{name}: capacity {request.kv_capacity} > {num_tokens}"
                assert request.kv_committed[index] * group.block_size <= request.num_computed_tokens, f"{name}: named"
                holders.update(table[dropped:])
            pool.check_integrity(holders)


def _root_hash(request: Request) -> bytes:
    """Start of the hash chain: everything but tokens that changes keys and values."""
    root = blake2b(digest_size=32)
    for key in (request.lora_id, request.cache_salt):
        # None and "" differ, and lengths keep neighbours apart.
        root.update(b"-" if key is None else b"%d:" % len(key.encode()) + key.encode())
    return root.digest()
