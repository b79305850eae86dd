"""`auto` on a GPU, without one: which targets take part, what is said of the others, and what becomes of their files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export import choose_cuda
from camshaft.export.build import Timer
from camshaft.export.manifest import BuildConfig, EngineFile
from camshaft.export.segment import Plan
from camshaft.export.targets.base import LoweringError
from camshaft.models.huggingface import open_model
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from families import random_model, tiny_config
from shared_traces import trace_decoder

CONFIG = BuildConfig(
    target="auto", device="cuda", dtype="bfloat16", max_seq_len=64, max_batch_tokens=8, max_sequences=4, block_size=16,
    buckets=(1, 4, 8),
)  # fmt: skip


class Stand:
    """A target that is there and lowers nothing."""

    fixed_sizes = False

    def __init__(self, name: str) -> None:
        self.name = name

    def fewest_tokens(self, device: torch.device) -> int:
        return 1

    def unavailable(self, device: torch.device) -> None:
        return None

    def supports(self, node: Any) -> bool:
        return True


@pytest.fixture
def program() -> Any:
    source = open_model(random_model(tiny_config("llama")), torch.float32)
    return PassManager(decoder_passes(block_size=16)).run(trace_decoder(source))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the targets that plans were lowered for; every segment gets a file."""
    names: list[str] = []

    def lower(
        plan: Plan, name: str, config: Any, directory: Path, *args: Any, **options: Any
    ) -> tuple[EngineFile, ...]:
        names.append(name)
        made = []
        for segment in plan.segments.values():
            for size in (1, 4, 8) if name == "tensorrt" else (None,):
                file = f"{segment.id}-{size}.{name}"
                (directory / file).write_bytes(b"x")
                made.append(EngineFile(segment=segment.id, target=name, file=file, tokens=size))
        return tuple(made)

    monkeypatch.setattr(choose_cuda, "lower_plan", lower)
    monkeypatch.setattr(choose_cuda, "get_target", Stand)
    monkeypatch.setattr("camshaft.export.choose.get_target", Stand)
    return names


def test_float32_is_left_to_inductor(program: Any, lowered: list[str], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, dtype="float32")
    made = choose_cuda.lower_fastest(program, config, tmp_path, Timer(None), False)
    assert (made.target, lowered) == ("inductor", ["inductor"])
    assert any("rounded to TF32" in line for line in made.report)


def test_engines_that_do_not_run_here_are_out_by_name(
    program: Any, lowered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise LoweringError("TensorRT does not open the engine (no reason given)")

    monkeypatch.setattr(choose_cuda, "measure", fail)
    made = choose_cuda.lower_fastest(program, CONFIG, tmp_path, Timer(None), False)
    assert lowered == ["tensorrt", "inductor"]
    assert (made.target, {file.target for file in made.files}) == ("inductor", {"inductor"})
    assert "does not run here: TensorRT does not open the engine" in made.report[0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".inductor"}


def test_the_faster_engine_of_each_size_is_kept(
    program: Any, lowered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(plan: Plan, *args: Any, **options: Any) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"segment": s.id, "symbol": "T", "size": size, "runs": 1, "ms": {}, "target": "tensorrt" if size == 4 else "inductor"}
            for s in plan.segments.values() for size in (1, 4, 8)
        )  # fmt: skip

    monkeypatch.setattr(choose_cuda, "measure", measure)
    made = choose_cuda.lower_fastest(program, CONFIG, tmp_path, Timer(None), False)
    assert made.target == "auto" and made.choices
    assert {(file.target, file.tokens) for file in made.files} == {("tensorrt", 4), ("inductor", None)}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.file for file in made.files)


def test_one_token_runs_in_tensorrt_everywhere_or_nowhere() -> None:
    def rows(alone: float, padded: float) -> list[dict[str, Any]]:
        return [
            {"segment": "a", "symbol": "T", "size": size, "runs": 2, "ms": {"tensorrt": ms, "inductor": 9.0}, "target": "x"}
            for size, ms in ((1, alone), (2, padded))
        ]  # fmt: skip

    faster, slower = rows(1.0, 2.0), rows(2.0, 1.0)
    choose_cuda._settle_single(faster)
    choose_cuda._settle_single(slower)
    assert (faster[0]["target"], slower[0]["target"]) == ("tensorrt", "inductor")
    assert faster[1]["target"] == "x"
