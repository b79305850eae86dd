"""Buckets: which sizes there are, what a step is padded to, and that padding changes no token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from camshaft.export.buckets import (
    Bucketed,
    StepShape,
    bucket_of,
    decode_sizes,
    default_buckets,
    engine_sizes,
    mixed_sizes,
    row_sizes,
    varying_size,
    verify_shape,
)  # fmt: skip
from camshaft.export.choose import plan_for
from camshaft.export.engine import Engine
from camshaft.export.execution import StepSizes
from camshaft.export.manifest import EngineFile
from camshaft.export.partition import partition
from camshaft.export.segment import Plan, Segment
from camshaft.export.targets.base import LoweringError, get_target
from camshaft.models.huggingface import open_model
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from families import random_model, tiny_config
from shared_traces import trace_decoder

import camshaft
from camshaft import LLM, SamplingParams

CPU = torch.device("cpu")


def test_sizes_of_captured_steps() -> None:
    buckets = default_buckets(8192, 1000)
    assert [size for size in decode_sizes(buckets, 1000) if size > 192] == [256, 384, 512, 640, 768, 896, 1000]
    assert decode_sizes(buckets, 3) == [1, 2, 4]
    sizes = mixed_sizes(8192)
    assert sizes[0] == 64 and sizes[-1] == 8192
    assert all(b - a <= max(64, b / 8) for a, b in zip(sizes, sizes[1:]))
    assert mixed_sizes(100) == [64, 100] and mixed_sizes(20) == [20]
    assert row_sizes(256) == [8, 64, 256] and row_sizes(5) == [5]
    assert verify_shape(5, 1, 5, 64, 512) == StepShape(6, 1, 6, False, 6)
    assert verify_shape(90, 15, 6, 64, 512) == StepShape(96, 16, 96, False, 8)
    assert verify_shape(20, 3, 11, 3, 512) == StepShape(24, 3, 24, False, 24)
    assert verify_shape(513, 64, 9, 64, 1024) is None and verify_shape(40, 1, 40, 64, 512) is None
    assert verify_shape(49, 9, 6, 9, 50) == StepShape(50, 9, 50, False, 8)
    assert verify_shape(40, 1, 40, 64, 512, trees=True) == StepShape(48, 1, 48, False, 48, True)
    assert verify_shape(65, 1, 65, 64, 512, trees=True) is None


def test_default_buckets() -> None:
    assert default_buckets(8192, 256) == (
        1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192,
    )  # fmt: skip
    assert default_buckets(64, 20) == (1, 2, 4, 8, 16, 20, 32, 48, 64)
    assert default_buckets(2, 1) == (1, 2)


def test_engines_of_fixed_size_are_built_for_powers_of_two_below_512() -> None:
    assert engine_sizes((1, 2, 32, 48, 64, 96, 128, 384, 512, 768, 1000)) == (1, 2, 32, 64, 128, 512, 768, 1000)
    assert engine_sizes((1, 20)) == (1, 20)  # a full step always has one


def test_bucket_of() -> None:
    assert [bucket_of((1, 4, 8), n) for n in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
    with pytest.raises(ValueError, match="a step of 9 tokens; the engine was built for at most 8"):
        bucket_of((1, 4, 8), 9)


def segment(*shapes: list[int | str], name: str = "s", eager: bool = False) -> Segment:
    nodes = [
        {"name": f"x{i}", "op": "placeholder", "shape": shape, "dtype": "float32"} for i, shape in enumerate(shapes)
    ]
    return Segment(name, nodes, len(shapes), 0, 1, eager)


class Doubler:
    """A Lowered that notes the sizes that it saw."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def bind(self, weights: object) -> object:
        def call(x: torch.Tensor) -> list[torch.Tensor]:
            self.sizes.append(x.shape[1])
            return [2 * x]

        return call


def test_one_size_varies_or_none() -> None:
    assert varying_size(segment([1, "T", 4], [7])) == "T"
    assert varying_size(segment([1, 4])) is None
    with pytest.raises(LoweringError, match=r"several varying sizes \(R, T\)"):
        varying_size(segment([1, "T"], ["R"]))


def test_a_bucketed_segment_opens_the_engine_of_its_size_when_it_is_needed() -> None:
    opened: list[int] = []
    engines = {size: Doubler() for size in (2, 4)}

    def opener(size: int) -> Doubler:
        opened.append(size)
        return engines[size]

    other = Doubler()
    lowered = Bucketed(segment([1, "T", 3]), {size: lambda size=size: opener(size) for size in engines}, other)  # type: ignore[misc]
    call = lowered.bind([])
    assert opened == []
    for size in (4, 4, 3):
        assert torch.equal(call(torch.ones(1, size, 3))[0], torch.full((1, size, 3), 2.0))
    assert opened == [4]
    assert (engines[4].sizes, other.sizes) == ([4, 4], [3])
    alone = Bucketed(segment([1, "T", 3]), {2: lambda: engines[2]}, None).bind([])
    with pytest.raises(LoweringError, match=r"no engine for 3 tokens, only for \[2\]"):
        alone(torch.ones(1, 3, 3))


def test_what_a_step_is_padded_to() -> None:
    first, second, head = segment([1, "T"], name="a"), segment([1, "T"], name="b"), segment(["R"], name="c")
    plan = Plan({s.id: s for s in (first, second, head)}, [], [], [])
    fixed = {size: Doubler for size in (1, 8)}
    varying = Doubler()
    mixed = {"a": Bucketed(first, fixed, varying), "b": varying, "c": varying}  # type: ignore[arg-type]
    sizes = StepSizes(plan, mixed, (1, 4, 8), 2)  # type: ignore[arg-type]
    assert [sizes.padded("T", n) for n in (1, 3, 5, 8)] == [2, 3, 8, 8]  # b takes two at least; 4 has no fixed engine
    assert [sizes.padded("R", n) for n in (1, 5)] == [2, 5]
    whole = {"a": Bucketed(first, fixed, None), "b": Bucketed(second, fixed, None), "c": varying}  # type: ignore[arg-type]
    alone = StepSizes(plan, whole, (1, 4, 8), 2)  # type: ignore[arg-type]
    assert [alone.padded("T", n) for n in (1, 2, 4, 5)] == [1, 8, 8, 8]  # nothing else runs 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    return camshaft.compile(
        random_model(tiny_config("llama")), target="eager", max_seq_len=96, max_batch_tokens=32, max_sequences=4,
        device="cpu",
    )  # fmt: skip


def test_split_rows_leaves_one_varying_size_in_each_segment() -> None:
    source = open_model(random_model(tiny_config("llama")), torch.float32)
    program = PassManager(decoder_passes(block_size=16)).run(trace_decoder(source))
    supports = get_target("eager").supports
    assert any(len({s for e in x.placeholders for s in e["shape"] if isinstance(s, str)}) == 2
               for x in partition(program, supports).segments.values())  # fmt: skip
    plan = partition(program, supports, split_rows=True)
    for part in plan.segments.values():
        assert part.eager or varying_size(part) in ("T", "R")
    assert [s.operators for s in plan.segments.values() if s.eager] == [["aten.index_select.default"]]
    assert plan.report == []


def test_steps_in_buckets_give_the_same_tokens(engine: Engine) -> None:
    source = open_model(random_model(tiny_config("llama")), torch.float32)
    program = PassManager(decoder_passes(block_size=16)).run(trace_decoder(source))
    plan = plan_for(program, "tensorrt") if get_target("tensorrt").unavailable(torch.device("cuda")) is None else (
        partition(program, lambda node: True, split_rows=True)
    )  # fmt: skip
    buckets = (1, 3, 8, 32)
    files = tuple(
        EngineFile(segment=s.id, target="eager", file="none", tokens=size)
        for s in plan.segments.values() if not s.eager for size in buckets
    )  # fmt: skip
    manifest = dataclasses.replace(
        engine.manifest, engines=files, build=dataclasses.replace(engine.manifest.build, buckets=buckets)
    )
    bucketed = Engine(manifest, plan, program.weights, engine.engine_dir, None)
    prompts = [[5, 9, 3], list(range(3, 60)), [7] * 20, [11], [4, 4]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(engine) as one, LLM(bucketed) as two:
        expected = [output.token_ids for output in one.generate(prompts, params)]
        assert [output.token_ids for output in two.generate(prompts, params)] == expected
    assert bucketed.capture() is None
    assert bucketed.uncaptured == "CUDA graphs need a GPU"


@pytest.mark.parametrize(
    ("given", "text"),
    [({"buckets": [0, 8]}, r"buckets hold \[0\]; allowed: 1 to max_batch_tokens \(64\)"),
     ({"buckets": [65]}, r"buckets hold \[65\]")],
)  # fmt: skip
def test_impossible_buckets(given: dict[str, list[int]], text: str) -> None:
    from camshaft.export.build import _buckets

    with pytest.raises(ValueError, match=text):
        _buckets(tuple(given["buckets"]), 64, 8)
    assert _buckets((8, 2), 64, 8) == (2, 8, 64)
