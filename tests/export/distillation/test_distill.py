"""Distillation end to end: the divergence falls, the checkpoint is an ordinary one, and a build of it is the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.distillation import update
from camshaft.export.distillation.settings import DistillationSettings
from camshaft.export.distillation.text import cut_rows, split_rows, write_rows
from camshaft.graph.linear_format import LinearFormat
from camshaft.passes.quantization.recipe import Recipe
from distillation_cases import SMALL, TEXT, tiny
from runtime.small_tokenizers import byte_level, save

import camshaft
from camshaft.cli.app import run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 with a tokenizer."""
    path: Path = tmp_path_factory.mktemp("distill") / "tiny"
    tiny().bfloat16().save_pretrained(path)
    save(byte_level(), path)
    return path


@pytest.fixture(scope="module")
def distilled(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(the checkpoint, what was reported) for nvfp4 and an fp8 KV cache."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    found = camshaft.distill(
        directory,
        out,
        quantize="nvfp4",
        kv_cache_dtype="fp8",
        data=[TEXT],
        device="cpu",
        steps=20,
        **{**SMALL, "sampled_tokens": 0},
    )
    return out, found


def test_the_divergence_falls(distilled: tuple[Path, Any]) -> None:
    out, found = distilled
    assert found.divergence < 0.95 * found.divergence_before and found.best_step > 0
    assert found.report[0] == "rounded: 8 linear layers to nvfp4/nvfp4"
    assert found.report[1] == "rounded: keys and values to float8_e4m3fn, keys as they are"
    assert any("it makes the logits" in line for line in found.report)
    facts = json.loads((out / "distillation.json").read_text())
    assert facts["quantize"] == "nvfp4" and facts["settings"]["steps"] == 20
    assert facts["outcome"]["divergence"] == found.divergence


def test_the_checkpoint_is_an_ordinary_one(directory: Path, distilled: tuple[Path, Any]) -> None:
    import transformers

    out, _ = distilled
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (directory, out))
    assert after.dtype == torch.bfloat16 and after.config.tie_word_embeddings
    weights = dict(before.named_parameters())
    assert weights.keys() == dict(after.named_parameters()).keys()
    moved = [name for name, parameter in after.named_parameters() if not torch.equal(weights[name], parameter)]
    assert "model.embed_tokens.weight" in moved and sum(name.endswith("proj.weight") for name in moved) == 14
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing of the writing stayed


def test_a_build_of_it_is_the_student(directory: Path, distilled: tuple[Path, Any]) -> None:
    """The divergence of the engine's own log-probabilities from the unquantized model's is what the training measured."""
    out, found = distilled
    rows = _validation(directory)
    limits: dict[str, Any] = {"target": "eager", "device": "cpu", "max_seq_len": 48, "max_sequences": 8, "cache": False}
    built = _logprobs(camshaft.compile(out, quantize="nvfp4", kv_cache_dtype="fp8", **limits), rows)
    plain = _logprobs(camshaft.compile(directory, **limits), rows)
    measured = float((plain.exp() * (plain - built)).sum(-1).mean())
    assert measured == pytest.approx(
        found.divergence, rel=0.02
    )  # float32; sums in another order move some inputs a step


def _validation(directory: Path) -> torch.Tensor:
    """The rows on which the training measured."""
    from camshaft.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(directory)
    ids = [token for part in TEXT.split("\f") for token in (*tokenizer.encode(part), tokenizer.eos_token_id)]
    return split_rows(cut_rows([ids], 32), DistillationSettings.of(**SMALL)).validation


def _logprobs(engine: Any, rows: torch.Tensor) -> torch.Tensor:
    """[rows * 32, V] of an engine, each row a prompt."""
    from camshaft import LLM, SamplingParams

    vocabulary = 340
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=vocabulary, logprobs=vocabulary, detokenize=False
    )
    scores = []
    with LLM(engine, kv_cache_bytes=1 << 22) as llm:
        for result in llm.generate(rows.tolist(), params):
            assert result.prompt_logprobs is not None
            entries = [*result.prompt_logprobs[1:], result.outputs[0].logprobs[0]]
            scores += [[entry[token].logprob for token in range(vocabulary)] for entry in entries]
    return torch.tensor(scores, dtype=torch.float64)


def test_a_model_in_memory_writes_what_it_learns_from(tmp_path: Path) -> None:
    model = tiny()
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recipe = Recipe(format=LinearFormat.parse("int4:g32:zp/none"))
    first, again = (
        camshaft.distill(
            model, tmp_path / name, quantize=recipe, device="cpu", steps=4, **{**SMALL, "sampled_tokens": 1024}
        )
        for name in ("a", "b")
    )
    assert first.divergence == again.divergence < first.divergence_before  # one seed, one result
    assert all(torch.equal(kept[name], parameter) for name, parameter in model.named_parameters())
    assert camshaft.compile(str(tmp_path / "a"), quantize=recipe, target="eager", device="cpu").weights_bytes > 0


def test_the_best_weights_are_kept(directory: Path, tmp_path: Path) -> None:
    found = camshaft.distill(
        directory,
        tmp_path / "out",
        quantize="int8",
        data=[TEXT],
        device="cpu",
        steps=2,
        **{**SMALL, "learning_rate": 0.5},
    )
    assert found.best_step == 0 and found.divergence == found.divergence_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "nvfp4_gptq"}, "nvfp4/nvfp4 gptq|nvfp4_gptq needs calibration"),
        ({"quantize": "fp8_static"}, "fp8_static needs calibration"),
        ({"quantize": "int5"}, "quantize is 'int5'; allowed"),
        ({}, "nothing is rounded: give quantize"),
        ({"quantize": "nvfp4", "kv_cache_dtype": "int8"}, "kv_cache_dtype is 'int8', whose scales"),
        ({"quantize": "nvfp4", "kv_cache_dtype": "fp4"}, "kv_cache_dtype is 'fp4'; allowed"),
        ({"quantize": "nvfp4", "center_keys": True}, "center_keys is of an fp8 KV cache"),
        ({"quantize": "int4", "group": 48}, "groups of 48"),
        ({"quantize": "fp8"}, "rounds no layer of tiny.*fewer than 131,072 weights"),
        ({"quantize": "nvfp4", "data": ["short"]}, "needs at least 128; give more text"),
        ({"quantize": "nvfp4", "context": 512}, "context is 512 tokens and tiny knows 128"),
        ({"quantize": "nvfp4", "steps": 0}, "steps is 0; allowed: 1 to"),
        ({"quantize": "nvfp4", "rate": 1.0}, "unknown rate; known: batch_tokens"),
        ({"quantize": "nvfp4", "prompt_tokens": 32}, "prompt_tokens is 32 and context 32"),
    ],
)
def test_what_is_refused(directory: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"data": [TEXT], "device": "cpu", **SMALL, **options}
    with pytest.raises(ValueError, match=message):
        camshaft.distill(directory, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_taken_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no empty directory"):
        camshaft.distill(directory, tmp_path, quantize="nvfp4", device="cpu")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    from stored_checkpoints import nvfp4, write_checkpoint
    from stored_checkpoints import tiny as small

    write_checkpoint(
        tmp_path / "q", small(), nvfp4("modelopt", static=2.0**-9), {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    )
    with pytest.raises(ValueError, match="is quantized already"):
        camshaft.distill(tmp_path / "q", tmp_path / "out", quantize="nvfp4", device="cpu", **SMALL)


def test_a_loss_that_is_not_finite_names_its_step(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = update.divergence, []

    def damaged(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        calls.append(student.requires_grad)
        return honest(student, teacher) * (float("nan") if sum(calls) == 3 else 1.0)

    monkeypatch.setattr(update, "divergence", damaged)
    with pytest.raises(RuntimeError, match="loss is nan in step 3: lower the learning rate"):
        camshaft.distill(directory, tmp_path / "out", quantize="nvfp4", data=[TEXT], device="cpu", steps=6, **SMALL)
    assert not list(tmp_path.iterdir())


def test_batches_see_every_row_and_the_end_is_held_back() -> None:
    settings = DistillationSettings.of(**{**SMALL, "context": 16, "prompt_tokens": 4})
    rows = split_rows(cut_rows([range(100), range(100, 165)], 16), settings)
    assert rows.train.shape == (8, 16) and rows.validation.flatten().tolist() == list(range(128, 160))
    seen = torch.cat(list(rows.batches(3, 8, seed=0)))
    assert sorted(seen[:8, 0].tolist()) == list(range(0, 128, 16)) == sorted(seen[8:16, 0].tolist())
    assert torch.equal(seen, torch.cat(list(rows.batches(3, 8, seed=0))))
    joined = rows.joined(torch.full((10, 16), 7), settings)
    assert joined.train.shape == (16, 16) and joined.validation.shape == (4, 16)
    assert joined.validation[2:].unique().tolist() == [7]


def test_written_rows_begin_with_the_text() -> None:
    settings = DistillationSettings.of(**SMALL)
    rows = torch.arange(96).view(3, 32)
    written = write_rows(tiny(), rows, 5, settings)
    assert written.shape == (5, 32)
    for row in written.tolist():
        assert row[:8] == list(range(row[0], row[0] + 8)) and row[0] // 32 == row[7] // 32
    assert torch.equal(written, write_rows(tiny(), rows, 5, settings))


def test_the_rate_rises_and_falls() -> None:
    settings = DistillationSettings(steps=100, warmup=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] < rates[5] < rates[10] == 1.0 > rates[50] > rates[99] > 0


def test_command_line(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    line = ["distill", str(directory), "-o", str(tmp_path / "out"), "--quantize", "nvfp4_weight_only", "--steps", "2", "--json",
            "--data", str(tmp_path / "text.txt"), "--context", "64", "--sampled-tokens", "0", "--device", "cpu"]  # fmt: skip
    assert run(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == 2 and document["report"][0] == "rounded: 8 linear layers to nvfp4/none"
    assert run(line) == 1 and "no empty directory" in capsys.readouterr().err
