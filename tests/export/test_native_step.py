"""Native steps against PyTorch: every operator, paged attention, whole decoders, threads, weights, errors."""

from __future__ import annotations

import gc
import operator
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import camshaft.graph.ops
import pytest
import torch
from camshaft.export.executor import Executor, StepContext
from camshaft.export.kernels import dispatch
from camshaft.export.kernels.cpu import CACHE_DTYPES
from camshaft.export.kernels.native import NativeBuildError, find_compiler
from camshaft.export.native_ops import supported
from camshaft.export.native_program import Unsupported, coalesce
from camshaft.export.native_step import MAX_TOKENS, NativeStep, outlook, refusal
from camshaft.export.segment import AttentionStep, Plan, Segment, SegmentStep
from camshaft.export.targets.eager import EagerTarget
from camshaft.graph.quant_ops import saturate
from camshaft.graph.serialize import graph_hash, graph_to_json
from camshaft.runtime.batch import Batch, GroupMetadata
from families import FAMILIES, every_family, random_model, tiny_config
from torch import Tensor, fx

import camshaft
from camshaft import SamplingParams

try:
    find_compiler()
except NativeBuildError:
    pytest.skip("no C compiler", allow_module_level=True)

aten, ops = torch.ops.aten, torch.ops.camshaft
CPU = torch.device("cpu")
WIDTH, VOCAB, BLOCK = 40, 23, 8  # 40: whole vectors and a rest
SIZES = (1, 2, 3, 4, 5, 8)


class Builder:
    """A segment under construction: calling it adds a node; `weight` adds a random weight."""

    def __init__(self, exact: bool = True) -> None:
        self.graph = fx.Graph()
        self.weights: dict[str, Tensor] = {}
        self.exact = exact
        self.generator = torch.Generator().manual_seed(0)
        self.inputs: list[fx.Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def placeholder(self, name: str, shape: tuple[Any, ...], dtype: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["spec"] = (shape, dtype)
        return node

    def weight(self, *shape: int) -> fx.Node:
        value = torch.randn(shape, generator=self.generator)
        name = f"w{len(self.weights)}"
        self.weights[name] = value.bfloat16().float() if self.exact else value
        with self.graph.inserting_after(self.last):
            self.last = self.placeholder(name, shape, "float32")
        return self.last

    def start(self, inputs: dict[str, tuple[tuple[Any, ...], str]]) -> list[fx.Node]:
        self.inputs = [self.placeholder(name, *spec) for name, spec in inputs.items()]
        self.last = self.inputs[-1]
        return self.inputs

    def segment(self, *outputs: fx.Node) -> Segment:
        self.graph.output(tuple(outputs))
        nodes = graph_to_json(self.graph)
        return Segment(graph_hash(nodes), nodes, len(self.inputs), len(self.weights), len(outputs))


def one_segment(
    make: Callable[[Builder, fx.Node, fx.Node], fx.Node], exact: bool = True
) -> tuple[Plan, dict[str, Tensor]]:
    """A plan whose output [1, T, n] is made of rows x [1, T, WIDTH] and of positions [1, T]."""
    g = Builder(exact)
    tokens, positions = g.start({"x0": ((1, "T"), "int64"), "x1": ((1, "T"), "int64")})
    x = g(aten.embedding.default, g.weight(VOCAB, WIDTH), tokens)
    segment = g.segment(make(g, x, positions))
    step = SegmentStep(segment.id, tuple(g.weights), ("token_ids", "positions"), ("out",))
    return Plan({segment.id: segment}, [step], ["token_ids", "positions", "sample_rows"], ["out"]), g.weights


def rows(num_tokens: int, num_sequences: int = 1, length: int = 30, groups: int = 1) -> Batch:
    """A batch of sequences of `num_tokens` new tokens each, `length` tokens after the step; all rows are sampled."""
    width = -(-length // BLOCK)
    order = torch.randperm(num_sequences * width, generator=torch.Generator().manual_seed(1))
    tables = order.int().view(num_sequences, width)
    positions = torch.arange(length - num_tokens, length)
    slots = torch.cat([table.long()[positions // BLOCK] * BLOCK + positions % BLOCK for table in tables])
    total = num_tokens * num_sequences
    return Batch(
        token_ids=(torch.arange(total) * 7 + 3) % VOCAB,
        positions=positions.repeat(num_sequences),
        groups=tuple(GroupMetadata(slots, tables) for _ in range(groups)),
        query_start=torch.arange(0, total + 1, num_tokens, dtype=torch.int32),
        seq_lens=torch.full((num_sequences,), length, dtype=torch.int32),
        sample_rows=torch.arange(total),
        max_query_len=num_tokens,
        max_seq_len=length,
    )


def check(plan: Plan, weights: dict[str, Tensor], native: NativeStep, batch: Batch, caches: Any = ()) -> Tensor:
    """The native result, after comparing it and what it wrote to the cache with the eager executor's."""
    lowered = {s.id: EagerTarget().load(s, None, CPU) for s in plan.segments.values()}
    executor = Executor(plan, lowered, weights)
    executor.caches = [(k.clone(), v.clone()) for k, v in caches]
    context = StepContext([(g.slot_mapping, g.block_tables) for g in batch.groups], batch.query_start, batch.seq_lens,
                          batch.max_query_len, batch.max_seq_len)  # fmt: skip
    values = {"token_ids": batch.token_ids[None], "positions": batch.positions[None], "sample_rows": batch.sample_rows}
    expected = executor.run([values[name] for name in plan.inputs], context)[0]
    got = native.step(batch, caches)
    # float32 sums in another order: a few units in the last place of the largest term
    torch.testing.assert_close(got, expected[0], rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
    for pair, other in zip(executor.caches, caches):
        for stored, expected_cache in zip(other, pair):
            torch.testing.assert_close(stored.float(), expected_cache.float(), rtol=1e-5, atol=1e-5)
    return got


def heads(g: Builder, x: fx.Node) -> fx.Node:
    return g(aten.reshape.default, x, [1, -1, 2, 20])


def flat(g: Builder, x: fx.Node) -> fx.Node:
    return g(aten.reshape.default, x, [1, -1, 40])


def turned(g: Builder, x: fx.Node, positions: fx.Node, interleaved: bool, rotated: int) -> fx.Node:
    """RoPE with angles computed from positions, as a traced model does it."""
    frequencies = g(aten.unsqueeze.default, g(aten.unsqueeze.default, g.weight(rotated // 2), 0), 2)
    moved = g(aten._to_copy.default, g(aten.unsqueeze.default, positions, 1), dtype=torch.float32)
    angles = g(aten.transpose.int, g(aten.matmul.default, frequencies, moved), 1, 2)
    if interleaved:
        angles = g(aten.repeat_interleave.self_int, angles, 2, 2)
    else:
        angles = g(aten.cat.default, [angles, angles], -1)
    cos, sin = g(aten.cos.default, angles), g(aten.sin.default, angles)
    return flat(g, g(ops.rope.default, heads(g, x), cos, sin, interleaved))


def one_argument(target: Any, g: Builder, x: fx.Node, positions: fx.Node, more: tuple[Any, ...] = ()) -> fx.Node:
    return g(target, x, *more)


def split_halves(g: Builder, x: fx.Node) -> fx.Node:
    parts = g(aten.split_with_sizes.default, x, [24, 16], -1)
    left, right = g(operator.getitem, parts, 0), g(operator.getitem, parts, 1)
    return g(aten.mul.Tensor, right, g(aten.slice.Tensor, left, 2, 0, 16))


def added_norm(g: Builder, x: fx.Node, part: int) -> fx.Node:
    other = g(aten.tanh.default, x)
    return g(operator.getitem, g(ops.add_rms_norm.default, x, other, g.weight(40), 1e-5, 0.0, True), part)


OPERATORS: dict[str, Callable[[Builder, fx.Node, fx.Node], fx.Node]] = {
    **{
        name: partial(one_argument, getattr(aten, name).default)
        for name in ("neg", "relu", "silu", "gelu", "tanh", "sigmoid", "cos", "sin", "square", "reciprocal")
    },
    "gelu_tanh": lambda g, x, p: g(aten.gelu.default, x, approximate="tanh"),
    "sqrt": lambda g, x, p: g(aten.sqrt.default, g(aten.square.default, x)),
    "rsqrt": lambda g, x, p: g(aten.rsqrt.default, g(aten.square.default, x)),
    "pow": lambda g, x, p: g(aten.pow.Tensor_Scalar, x, 3.0),
    "pow_fraction": lambda g, x, p: g(aten.pow.Tensor_Scalar, g(aten.square.default, x), 0.7),
    "large_inputs": lambda g, x, p: g(aten.silu.default, g(aten.mul.Tensor, x, 1e3)),
    "softcap": lambda g, x, p: g(aten.mul.Tensor, g(aten.tanh.default, g(aten.div.Tensor, x, 5.0)), 5.0),
    "add_scalar": lambda g, x, p: g(aten.add.Tensor, x, 1.5),
    "add_alpha": lambda g, x, p: g(aten.add.Tensor, x, g.weight(40), alpha=2),
    "subtract_rows": lambda g, x, p: g(aten.sub.Tensor, x, g(aten.mean.dim, x, [-1], True)),
    "divide": lambda g, x, p: g(aten.div.Tensor, x, g.weight(40)),
    "linear": lambda g, x, p: g(aten.linear.default, x, g.weight(70, 40)),
    "linear_bias": lambda g, x, p: g(aten.linear.default, x, g.weight(33, 40), g.weight(33)),
    "linear_odd": lambda g, x, p: g(aten.linear.default, g(aten.slice.Tensor, x, 2, 3, 40), g.weight(5, 37)),
    "linear_long": lambda g, x, p: g(
        aten.linear.default, g(aten.linear.default, x, g.weight(1100, 40)), g.weight(34, 1100)
    ),
    "matmul_weight": lambda g, x, p: g(aten.matmul.default, x, g.weight(40, 12)),
    "rms_norm": lambda g, x, p: g(ops.rms_norm.default, x, g.weight(40), 1e-6, 0.0, True),
    "rms_norm_offset": lambda g, x, p: g(ops.rms_norm.default, x, g.weight(40), 1e-6, 1.0, False),
    "rms_norm_plain": lambda g, x, p: g(ops.rms_norm.default, x, None, 1e-6, 0.0, False),
    "rms_norm_heads": lambda g, x, p: flat(g, g(ops.rms_norm.default, heads(g, x), g.weight(20), 1e-6, 0.0, True)),
    "add_rms_norm": lambda g, x, p: added_norm(g, x, 0),
    "add_rms_norm_sum": lambda g, x, p: added_norm(g, x, 1),
    "layer_norm": lambda g, x, p: g(aten.layer_norm.default, x, [40], g.weight(40), g.weight(40), 1e-5),
    "layer_norm_plain": lambda g, x, p: g(aten.layer_norm.default, x, [40]),
    "rope": lambda g, x, p: turned(g, x, p, False, 20),
    "rope_part": lambda g, x, p: turned(g, x, p, False, 12),
    "rope_interleaved": lambda g, x, p: turned(g, x, p, True, 20),
    **{
        f"glu_{name}": partial(one_argument, ops.glu.default, more=(name,))
        for name in ("silu", "gelu", "gelu_tanh", "relu")
    },
    "split": lambda g, x, p: split_halves(g, x),
    "transposed": lambda g, x, p: flat(g, g(aten.permute.default, heads(g, x), [0, 1, 3, 2])),
    "stack": lambda g, x, p: g(aten.reshape.default, g(aten.stack.default, [x, x], -1), [1, -1, 80]),
    "cat": lambda g, x, p: g(aten.cat.default, [x, g(aten.neg.default, x)], -1),
    "positions": lambda g, x, p: g(
        aten.add.Tensor, x, g(aten.embedding.default, g.weight(64, 40), g(aten.add.Tensor, p, 2))
    ),
    "index": lambda g, x, p: g(aten.add.Tensor, x, g(aten.index.Tensor, g.weight(64, 40), [p])),
    "constant": lambda g, x, p: g(aten.mul.Tensor, x, g(aten.exp.default, g.weight(40))),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_eager(name: str) -> None:
    plan, weights = one_segment(OPERATORS[name])
    values = {"token_ids": torch.zeros(1, 2, dtype=torch.long), "positions": torch.arange(2)[None]}
    (segment,) = plan.segments.values()
    width = segment.graph_module(CPU)(*values.values(), *weights.values())[0].shape[-1]
    native = NativeStep(plan, weights, width)
    for num_tokens in SIZES:
        check(plan, weights, native, rows(num_tokens))


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": "sinks"},
    "alibi": {"alibi_slopes": "slopes"},
    "all": {"window": 9, "softcap": 3.0, "sinks": "sinks", "alibi_slopes": "slopes"},
}


def attention_plan(**options: Any) -> tuple[Plan, dict[str, Tensor]]:
    """Two segments around attention of 4 heads over 2 key heads; q, k and v are views of one product."""
    g = Builder()
    (tokens,) = g.start({"x0": ((1, "T"), "int64")})
    x = g(aten.embedding.default, g.weight(VOCAB, WIDTH), tokens)
    parts = g(aten.split_with_sizes.default, g(aten.linear.default, x, g.weight(96, WIDTH)), [48, 24, 24], -1)
    q, k, v = (g(aten.reshape.default, g(operator.getitem, parts, i), [1, -1, n, 12]) for i, n in enumerate((4, 2, 2)))
    first = g.segment(q, k, v)
    h = Builder()
    mixed, wanted = h.start({"x0": ((1, "T", 4, 12), "float32"), "x1": (("R",), "int64")})
    last = h.segment(h(aten.index_select.default, h(aten.reshape.default, mixed, [1, -1, 48]), 1, wanted))
    fields = {"scale": 12**-0.5, "window": 0, "softcap": 0.0, "sinks": None, "alibi_slopes": None} | options
    steps = [
        SegmentStep(first.id, tuple(g.weights), ("token_ids",), ("q", "k", "v")),
        AttentionStep(layer=0, group=0, q="q", k="k", v="v", output="mixed", **fields),
        SegmentStep(last.id, (), ("mixed", "sample_rows"), ("out",)),
    ]
    weights = g.weights | {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}
    plan = Plan({s.id: s for s in (first, last)}, steps, ["sample_rows", "token_ids", "positions"], ["out"])
    return plan, weights


def filled_caches(num_blocks: int = 40, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    scale = 6.0 if dtype == torch.int8 else 1.0  # as large as the plan's keys and values
    pair = [torch.randn(num_blocks, BLOCK, 2, 12, generator=generator) * scale for _ in "kv"]
    return [(saturate(pair[0], dtype), saturate(pair[1], dtype))]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_reference(name: str) -> None:
    plan, weights = attention_plan(**ATTENTION[name])
    native = NativeStep(plan, weights, 48)
    for num_tokens, num_sequences in ((1, 1), (3, 1), (8, 1), (1, 5), (2, 4)):
        check(plan, weights, native, rows(num_tokens, num_sequences), filled_caches())


@pytest.mark.parametrize("dtype", CACHE_DTYPES[1:], ids=str)
def test_attention_over_bytes_equals_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.cpu, "supports", lambda *_: False)  # the executor's attention is the torch reference
    for name in ("plain", "all"):
        plan, weights = attention_plan(**ATTENTION[name])
        native = NativeStep(plan, weights, 48)
        for num_tokens, num_sequences in ((1, 1), (3, 1), (8, 1), (1, 5), (2, 4)):
            check(plan, weights, native, rows(num_tokens, num_sequences), filled_caches(dtype=dtype))


def test_a_cache_in_half_precision_is_refused() -> None:
    plan, weights = attention_plan()
    with pytest.raises(Unsupported, match=r"a KV cache in torch\.bfloat16"):
        NativeStep(plan, weights, 48).check(filled_caches(dtype=torch.bfloat16))


def test_skipped_slots_and_some_rows() -> None:
    plan, weights = attention_plan()
    native = NativeStep(plan, weights, 48)
    batch = rows(4)
    batch.groups[0].slot_mapping[:2] = -1
    batch = replace(batch, sample_rows=torch.tensor([1, 3]))
    assert check(plan, weights, native, batch, filled_caches()).shape == (2, 48)


NOT_NATIVE = ("mixtral", "qwen3_moe", "gpt_oss", "gptj", "falcon")


@pytest.mark.parametrize("name", every_family(name for name in FAMILIES if name not in NOT_NATIVE))
def test_families_equal_eager(name: str) -> None:
    engine = camshaft.compile(random_model(tiny_config(name)), target="eager", max_seq_len=64, max_batch_tokens=32,
                              max_sequences=8, block_size=BLOCK, device="cpu", progress=False)  # fmt: skip
    weights = {key: engine.weights[key].load() for key in engine.plan.weight_names}
    native = NativeStep(engine.plan, weights, engine.vocab_size)
    generator = torch.Generator().manual_seed(5)
    caches = []
    for layer in engine.manifest.cache.layers:
        shape = (48, BLOCK, layer.num_kv_heads)
        sizes = ((*shape, layer.head_dim), (*shape, layer.value_dim))
        caches.append(tuple(torch.randn(size, generator=generator) for size in sizes))
    for num_tokens, num_sequences in ((1, 1), (2, 1), (4, 1), (7, 1), (8, 1), (1, 3), (2, 4)):
        batch = rows(num_tokens, num_sequences, groups=len(engine.cache_groups))
        fresh = [(k.clone(), v.clone()) for k, v in caches]
        check(engine.plan, weights, native, batch, fresh)


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_give_the_same_bits(two_threads: Any) -> None:
    plan, weights = one_segment(OPERATORS["linear_long"])
    native = NativeStep(plan, weights, 34)
    batch = rows(3)
    for _ in range(50):
        torch.set_num_threads(1)
        alone = native.step(batch, [])
        torch.set_num_threads(2)
        assert torch.equal(native.step(batch, []), alone)


def test_calls_from_several_python_threads(two_threads: Any) -> None:
    plan, weights = one_segment(OPERATORS["linear_long"])
    native = NativeStep(plan, weights, 34)
    batches = [rows(n) for n in (1, 2, 3, 4)]
    expected = [native.step(batch, []) for batch in batches]
    wrong: list[int] = []

    def use(index: int) -> None:
        for _ in range(30):
            if not torch.equal(native.step(batches[index], []), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=use, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_workers_end_with_their_engine(two_threads: Any) -> None:
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    plan, weights = one_segment(OPERATORS["linear"])
    gc.collect()  # engines of earlier tests end here, not between the two counts
    before = num_threads()
    native = NativeStep(plan, weights, 70)
    native.step(rows(1), [])
    assert num_threads() == before + 1
    del native
    gc.collect()
    assert num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_a_forked_child_has_its_own_workers(two_threads: Any) -> None:
    plan, weights = one_segment(OPERATORS["linear_long"])
    native = NativeStep(plan, weights, 34)
    batch = rows(2)
    expected = native.step(batch, [])
    child = os.fork()
    if child == 0:
        same = torch.equal(native.step(batch, []), expected)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(native.step(batch, []), expected)


def test_bfloat16_copies_only_where_they_are_exact() -> None:
    def two(g: Builder, x: fx.Node, p: fx.Node) -> fx.Node:
        return g(aten.linear.default, x, g.weight(33, 40))

    plan, weights = one_segment(two)
    native = NativeStep(plan, weights, 33)
    native.check([])
    panel = native._store.panel
    assert native.copied_bytes == 2 * 40 * -(-33 // panel) * panel
    plan, weights = one_segment(two, exact=False)
    native = NativeStep(plan, weights, 33)
    for num_tokens in SIZES:
        check(plan, weights, native, rows(num_tokens))
    assert native.copied_bytes == 0


def test_a_bad_token_is_named() -> None:
    plan, weights = one_segment(OPERATORS["linear"])
    native = NativeStep(plan, weights, 70)
    batch = rows(3)
    batch.token_ids[1] = VOCAB
    with pytest.raises(ValueError, match=rf"row 1 .* row {VOCAB} of a table of {VOCAB} rows"):
        native.step(batch, [])
    assert torch.isfinite(native.step(rows(3), [])).all()


def test_bad_slots_blocks_and_shapes_are_named() -> None:
    plan, weights = attention_plan()
    native, caches = NativeStep(plan, weights, 48), filled_caches()
    batch = rows(2)
    batch.groups[0].slot_mapping[1] = 40 * BLOCK
    with pytest.raises(ValueError, match=r"slot_mapping\[1\] is 320"):
        native.step(batch, caches)
    batch = rows(2)
    batch.groups[0].block_tables[0, 1] = 40
    with pytest.raises(ValueError, match=r"block_tables\[0\]"):
        native.step(batch, caches)
    with pytest.raises(ValueError, match="int32"):
        native.step(replace(rows(2), seq_lens=torch.tensor([30])), caches)
    with pytest.raises(ValueError, match="slot_mapping"):
        native.step(replace(rows(2), groups=rows(3).groups), caches)


def test_new_caches_are_noticed() -> None:
    plan, weights = attention_plan()
    native = NativeStep(plan, weights, 48)
    first, second = filled_caches(), filled_caches(50)
    check(plan, weights, native, rows(1), first)
    check(plan, weights, native, rows(1), second)


def test_many_sizes_share_one_arena() -> None:
    plan, weights = attention_plan()
    native, caches = NativeStep(plan, weights, 48), filled_caches(200)
    native.check(caches)
    for num_tokens in range(1, MAX_TOKENS + 1):
        for count in range(1, num_tokens + 1, 3):
            batch = replace(rows(num_tokens), sample_rows=torch.arange(num_tokens)[-count:])
            check(plan, weights, native, batch, caches)
    assert len({ready.arena.data_ptr() for ready in native._ready.values()}) == 1


def test_what_it_cannot_run_is_named() -> None:
    plan, weights = one_segment(lambda g, x, p: g(aten.cumsum.default, x, -1))
    with pytest.raises(Unsupported, match=r"aten\.cumsum\.default"):
        NativeStep(plan, weights, WIDTH).check([])
    plan, weights = one_segment(lambda g, x, p: g(aten.mean.dim, x, [1], True))
    with pytest.raises(Unsupported, match=r"aten\.mean\.dim on the dimensions \[1\]"):
        NativeStep(plan, weights, WIDTH).check([])
    assert not supported("aten.topk.default")
    with pytest.raises(Unsupported, match="independent strides"):
        coalesce((2, 2, 2), [(1, 8, 64)], 2)


def test_an_engine_tells_of_its_native_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = {"max_seq_len": 64, "max_batch_tokens": 16, "max_sequences": 2, "device": "cpu", "progress": False}
    engine = camshaft.compile(random_model(tiny_config("llama")), target="onnxruntime", **limits)
    assert engine.native_step == outlook(engine.plan, engine.config)
    before = engine.weights_bytes
    with caplog.at_level("INFO", "camshaft.export.native_step"):
        engine.prepare()
    assert engine.native_step in caplog.text
    assert engine.native_step.startswith(f"native step up to {MAX_TOKENS} tokens")
    assert engine.weights_bytes == before + engine._native.copied_bytes  # type: ignore[union-attr]
    assert refusal(engine.plan, replace(engine.config, target="eager")) is not None
    assert "bfloat16" in str(refusal(engine.plan, replace(engine.config, dtype="bfloat16")))
    mixed = camshaft.compile(random_model(tiny_config("mixtral")), target="onnxruntime", **limits)
    mixed.prepare()
    assert "no native step" in mixed.native_step and "camshaft.moe.default" in mixed.native_step


def test_half_precision_checkpoints_keep_their_tokens(tmp_path: Path) -> None:
    """Weights rounded to bfloat16: the step reads copies, and the tokens are those of the eager engine."""
    model = random_model(tiny_config("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    results = []
    for target in ("eager", "onnxruntime"):
        engine = camshaft.compile(model, target=target, max_seq_len=64, max_batch_tokens=32, max_sequences=4,
                                  block_size=8, device="cpu", progress=False)  # fmt: skip
        with camshaft.LLM(engine) as llm:
            params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            results.append([out.token_ids for out in llm.generate([[5, 6, 7], [9] * 20, [11]], params)])
        copied = engine._native.copied_bytes if engine._native is not None else 0
        assert (copied > 0) == (target == "onnxruntime")
    assert results[0] == results[1]
