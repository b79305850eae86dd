"""expose_cache: caches go in and out of the graph; prefill and decode give the logits of the model without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from camshaft.graph.numerics import run_program
from camshaft.graph.program import Program
from camshaft.graph.verify import verify
from camshaft.models.huggingface import open_model
from camshaft.passes.base import GraphPass
from camshaft.passes.expose_cache import MASKED_ATTENTION, READ_BLOCKS, UPDATE_CACHE, WRITE_BLOCKS, ExposeCache
from camshaft.passes.manager import PassManager
from camshaft.passes.normalize import Normalize
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes
from camshaft.passes.select_rows import SelectRows
from families import random_model, tiny_config
from graph_cases import check, rows
from shared_traces import trace_decoder
from torch import Tensor, nn

BLOCK_SIZE = 4
LENGTH = 32


@pytest.fixture(scope="module")
def gemma() -> tuple[nn.Module, Program]:
    """A window layer, a full layer, and a soft cap; canonical and fused."""
    model = random_model(tiny_config("gemma2"))
    program = trace_decoder(open_model(model, torch.float32))
    return model, PassManager([*canonicalize_passes(), *fuse_passes()]).run(program)


def exposed(program: Program, kind: Any, *, last: bool = True, **sizes: int | None) -> Program:
    """The program with caches in and out, checked."""
    options: dict[str, Any] = {"batch_size": None, "num_tokens": None, **sizes}
    expose = ExposeCache(kind=kind, max_seq_len=LENGTH, block_size=BLOCK_SIZE, **options)
    passes: list[GraphPass] = [*([SelectRows()] if last else []), expose, Normalize()]
    made = PassManager(passes).run(program)
    assert made.history[-2].num_matches == 2
    verify(made, after="expose_cache")
    return made


class Caller:
    """Holds the caches of two sequences and makes the inputs of a step."""

    def __init__(self, program: Program, kind: str, num_blocks: int = 17) -> None:
        self.program, self.paged, self.lengths = program, kind == "paged", [0, 0]
        sizes = [num_blocks] if self.paged else [2]
        self.caches = {
            spec.name: torch.zeros([*sizes, *(int(size) for size in spec.shape[1:])])
            for _, spec in program.placeholders("cache")
        }
        self.names = [f"{name}_cache_{layer}" for layer in range(2) for name in "kv"]
        self.tables = torch.tensor([[3, 1, 5, 7, 2, 9, 4, 6], [16, 10, 12, 11, 15, 13, 8, 14]])

    def step(self, new: list[list[int]]) -> Tensor:
        """The first output for the new tokens of both sequences, padded at the end with token 77."""
        num_rows = max(map(len, new))
        feeds: dict[str, Tensor] = {
            "token_ids": torch.full((2, num_rows), 77),
            "positions": torch.zeros((2, num_rows), dtype=torch.int64),
            "last_rows": torch.tensor([len(tokens) - 1 for tokens in new]),
            "slot_mapping": torch.zeros((2, num_rows), dtype=torch.int64),
            "block_tables": self.tables,
        }
        for b, tokens in enumerate(new):
            at = self.lengths[b] + torch.arange(num_rows)
            count = len(tokens)
            feeds["token_ids"][b, :count] = torch.tensor(tokens)
            feeds["positions"][b] = torch.where(torch.arange(num_rows) < count, at, 0) if self.paged else at
            feeds["slot_mapping"][b, :count] = (
                self.tables[b, at[:count] // BLOCK_SIZE] * BLOCK_SIZE + at[:count] % BLOCK_SIZE
            )
            self.lengths[b] += count
        logits, *caches = run_program(self.program, {**feeds, **self.caches})
        self.caches = dict(zip(self.names, caches, strict=True))
        return logits


def expected(model: nn.Module, prefixes: list[list[int]]) -> Tensor:
    """Logits after each prefix, by the model itself."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([tokens])).logits[0, -1] for tokens in prefixes])


@pytest.mark.parametrize("kind", ["linear", "paged"])
def test_prefill_and_decode_equal_the_model(gemma: tuple[nn.Module, Program], kind: str) -> None:
    """Varying sizes; prompts longer than the window (16), one of them in two pieces."""
    model, program = gemma
    caller = Caller(exposed(program, kind), kind)
    first, second = list(range(20, 42)), [5, 6, 7]
    torch.testing.assert_close(caller.step([first, second]), expected(model, [first, second]), rtol=1e-4, atol=1e-4)
    for pair in ([[9, 10], [11]], [[12], [13]], [[14], [15, 16]]):
        first, second = first + pair[0], second + pair[1]
        torch.testing.assert_close(caller.step(pair), expected(model, [first, second]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "paged"])
def test_fixed_sizes_leave_no_size_in_the_graph(gemma: tuple[nn.Module, Program], kind: str) -> None:
    model, program = gemma
    fixed = {"num_blocks": 17, "table_width": 8} if kind == "paged" else {}
    made = exposed(program, kind, batch_size=2, num_tokens=3, **fixed)
    for node in made.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, int | torch.SymInt)
        if isinstance(value, Tensor):
            assert all(isinstance(size, int) for size in value.shape), node.format_node()
    caller = Caller(made, kind)
    torch.testing.assert_close(
        caller.step([[5, 6, 7], [8, 9]]), expected(model, [[5, 6, 7], [8, 9]]), rtol=1e-4, atol=1e-4
    )
    single = exposed(program, kind, batch_size=2, num_tokens=1, **fixed)
    caller.program = single  # the same caches go on in another program
    torch.testing.assert_close(
        caller.step([[3], [4]]), expected(model, [[5, 6, 7, 3], [8, 9, 4]]), rtol=1e-4, atol=1e-4
    )


def test_logits_of_all_rows(gemma: tuple[nn.Module, Program]) -> None:
    model, program = gemma
    made = exposed(program, "linear", last=False)
    assert [spec.key for _, spec in made.placeholders("metadata")] == []
    logits = Caller(made, "linear").step([[5, 6, 7], [8, 9, 10]])
    assert logits.shape == (2, 3, 128) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 1], expected(model, [[5, 6], [8, 9]]), rtol=1e-4, atol=1e-4)


def test_operators_inputs_and_masks(gemma: tuple[nn.Module, Program]) -> None:
    linear, paged = exposed(gemma[1], "linear"), exposed(gemma[1], "paged")
    assert [linear.count(op) for op in (UPDATE_CACHE, MASKED_ATTENTION, WRITE_BLOCKS)] == [4, 2, 0]
    assert [paged.count(op) for op in (WRITE_BLOCKS, READ_BLOCKS, MASKED_ATTENTION, UPDATE_CACHE)] == [4, 4, 2, 0]
    assert {spec.key for _, spec in paged.placeholders("metadata")} == {"block_tables", "slot_mapping", "last_rows"}
    assert {spec.key for _, spec in linear.placeholders("cache")} == {"k.0", "v.0", "k.1", "v.1"}
    masks = {node.args[3] for node in linear.graph.nodes if node.target == MASKED_ATTENTION}
    assert len(masks) == 2  # the window's, and the full layer's
    assert linear.count(torch.ops.aten.gt.Tensor) == 1
    assert linear.cache is not None and linear.cache.windows == (0, 16)


def test_second_run_finds_nothing(gemma: tuple[nn.Module, Program]) -> None:
    made = exposed(gemma[1], "linear")
    again = ExposeCache(kind="linear", batch_size=None, num_tokens=None, max_seq_len=LENGTH)(made)
    assert again.num_matches == 0
    assert [n.format_node() for n in again.program.graph.nodes] == [n.format_node() for n in made.graph.nodes]


def test_no_attention() -> None:
    expose = ExposeCache(kind="paged", batch_size=None, num_tokens=None, max_seq_len=LENGTH)
    assert check(expose, nn.Linear(8, 8), rows(8), matches=0).cache is None
