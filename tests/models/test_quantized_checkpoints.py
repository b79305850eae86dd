"""Quantized checkpoints of every scheme: the matrices that they mean, to the last bit, and the tokens of their model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import stored_checkpoints as stored
import torch
from camshaft.models import huggingface
from camshaft.models.huggingface import open_model
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import decoder_passes
from camshaft.passes.quantization.support import KernelSupport
from families import greedy_tokens
from safetensors.torch import load_file, save_file
from stored_checkpoints import Written, write_checkpoint

import camshaft
from camshaft import SamplingParams

LIMITS: dict[str, Any] = {
    "target": "eager", "device": "cpu", "dtype": "float32", "max_seq_len": 64, "max_batch_tokens": 32, "max_sequences": 4,
    "cache": False,
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
FLOAT = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}


def _compressed(format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def _ints(bits: int, group: int | None, symmetric: bool = True) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    return {"type": "int", "num_bits": bits, "strategy": strategy, "group_size": group, "symmetric": symmetric}


def _floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": "float", "num_bits": bits, "strategy": strategy, "symmetric": True, **more}


STATIC = {"strategy": "tensor", "dynamic": False}
NVFP4 = _floats(4, "tensor_group", group_size=16)
SCHEMES: dict[str, tuple[stored.Writer, dict[str, Any], str, int]] = {
    "awq": (stored.awq(), AWQ, "int4:g32:zp/none", 4),
    "gptq": (stored.gptq(), GPTQ, "int4:g32:zp/none", 4),
    "gptq_v2": (stored.gptq(version=2), {**GPTQ, "checkpoint_format": "gptq_v2"}, "int4:g32:zp/none", 4),
    "gptq_symmetric": (stored.gptq(symmetric=True), {**GPTQ, "sym": True}, "int4:g32/none", 4),
    "gptq_rows": (stored.gptq(-1, symmetric=True), {**GPTQ, "sym": True, "group_size": -1}, "int4/none", 4),
    "gptq_8_bits": (stored.gptq(bits=8), {**GPTQ, "bits": 8}, "int8:g32:zp/none", 4),
    "gptq_8_bits_symmetric": (
        stored.gptq(bits=8, symmetric=True), {**GPTQ, "bits": 8, "sym": True}, "int8:g32/none", 4,
    ),
    "gptq_act_order": (stored.gptq(act_order=True), {**GPTQ, "desc_act": True}, "int4:g32:zp/none", 4),
    "packed": (stored.packed(), _compressed("pack-quantized", _ints(4, 32)), "int4:g32/none", 4),
    "packed_zero_points": (
        stored.packed(symmetric=False), _compressed("pack-quantized", _ints(4, 32, False)), "int4:g32:zp/none", 4,
    ),
    "packed_rows": (stored.packed(-1), _compressed("pack-quantized", _ints(4, None)), "int4/none", 4),
    "packed_8_bits": (stored.packed(bits=8), _compressed("pack-quantized", _ints(8, 32)), "int8:g32/none", 4),
    "packed_w4a8": (
        stored.packed(rounding=stored.int8_tokens), _compressed("pack-quantized", _ints(4, 32), INT), "int4:g32/int8", 4,
    ),
    "int8": (stored.int8(), _compressed("int-quantized", _ints(8, None), INT), "int8/int8", 4),
    "int8_static": (
        stored.int8(static=0.05), _compressed("int-quantized", _ints(8, None), {**INT, **STATIC}), "int8/int8_static", 4,
    ),
    "int8_zero_points": (
        stored.int8(symmetric=False), _compressed("int-quantized", _ints(8, None, False), INT), "int8:zp/int8", 4,
    ),
    "fp8_rows": (stored.fp8(), _compressed("float-quantized", _floats(8, "channel"), FLOAT), "fp8/fp8", 4),
    "fp8_tensor": (
        stored.fp8("tensor", static=0.01), _compressed("float-quantized", _floats(8, "tensor"), {**FLOAT, **STATIC}),
        "fp8:tensor/fp8_static", 4,
    ),
    "fp8_blocks": (
        stored.fp8("block"),
        _compressed(
            "float-quantized", _floats(8, "block", block_structure=[128, 128]),
            {**FLOAT, "strategy": "group", "group_size": 128},
        ),
        "fp8:block128/fp8_block", 7,
    ),
    "nvfp4": (
        stored.nvfp4("compressed-tensors", static=2.0**-9),
        _compressed("nvfp4-pack-quantized", NVFP4, {**NVFP4, "dynamic": "local"}), "nvfp4/nvfp4", 4,
    ),
    "nvfp4_weights": (
        stored.nvfp4("compressed-tensors"), _compressed("nvfp4-pack-quantized", NVFP4), "nvfp4/none", 4,
    ),
    "mxfp4": (stored.mxfp4, _compressed("mxfp4-pack-quantized", _floats(4, "group", group_size=32)), "mxfp4/none", 4),
    "mxfp8": (stored.mxfp8, _compressed("mxfp8-quantized", _floats(8, "group", group_size=32)), "mxfp8/none", 4),
    "modelopt_fp8": (
        stored.fp8("tensor", static=0.01), {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8:tensor/fp8_static", 4,
    ),
    "modelopt_nvfp4": (
        stored.nvfp4("modelopt", static=2.0**-9), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4/nvfp4", 4,
    ),
    "deepseek_fp8": (
        stored.fp8("block", scale_name="weight_scale_inv"), {**FP8, "weight_block_size": [128, 128]},
        "fp8:block128/fp8_block", 7,
    ),
    "fp8_static": (
        stored.fp8("tensor", static=0.01), {**FP8, "activation_scheme": "static"}, "fp8:tensor/fp8_static", 4,
    ),
    "fbgemm": (stored.fp8(), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8/fp8", 4),
}  # fmt: skip
"""Name: writer, quantization_config, the format it is read as, linear layers of the program (7 where none can be joined)."""


@pytest.fixture(scope="module")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture
def path(_directory: Path) -> Path:
    """Where a test writes its checkpoint: one place, so that all of one config share a trace."""
    shutil.rmtree(_directory / "model", ignore_errors=True)
    return _directory / "model"


def _tokens(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    with camshaft.LLM(engine, kv_cache_bytes=1 << 20) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    return [output.token_ids for output in outputs]


def _check_tokens(written: Written, engine: Any) -> None:
    prompts = [list(range(3, 20)), [5, 90, 7]]
    assert _tokens(engine, prompts) == [greedy_tokens(written.reference, prompt, 8) for prompt in prompts]


def _bound(engine: Any) -> int:
    return sum(record.num_matches for record in engine.manifest.passes if record.name == "bind_stored_weights")


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name: str, path: Path) -> None:
    writer, quantization, format, layers = SCHEMES[name]
    written = write_checkpoint(path, stored.tiny(), writer, quantization)
    weights = open_model(written.path, torch.float32).weights
    for key, dense in written.dense.items():
        assert torch.equal(weights[key].load(), dense), key
        kept = weights[key].stored
        assert kept is not None and str(kept.format) == format
    engine = camshaft.compile(written.path, **LIMITS)
    assert _bound(engine) == layers
    assert any(
        line == f"{quantization['quant_method']}: 7 layers are stored as {format}" for line in engine.manifest.report
    )
    _check_tokens(written, engine)


@pytest.mark.parametrize("name", ["awq", "gptq_act_order", pytest.param("fp8_rows", marks=pytest.mark.long)])
def test_biases(name: str, path: Path) -> None:
    writer, quantization, _, layers = SCHEMES[name]
    model = stored.tiny("qwen2")
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.normal_()
    written = write_checkpoint(path, model, writer, quantization)
    engine = camshaft.compile(written.path, **LIMITS)
    assert _bound(engine) == layers
    _check_tokens(written, engine)


def test_saved_and_cached_builds_keep_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path / "cache"))
    written = write_checkpoint(path, stored.tiny(), *SCHEMES["gptq_act_order"][:2])
    engine = camshaft.compile(written.path, **{**LIMITS, "cache": True})
    engine.save(tmp_path / "engine")
    again = camshaft.compile(written.path, **{**LIMITS, "cache": True})
    assert again.manifest.timings.get("cached") == 1.0
    for built in (again, camshaft.load(tmp_path / "engine")):
        _check_tokens(written, built)
    assert not any(name.endswith("proj.weight") for name in again.plan.weight_names)
    packed = [name for name in again.plan.weight_names if again.weights[name].dtype == torch.uint8]
    assert len(packed) == 8  # values and zero points of four products


def test_another_order_of_columns_is_another_build(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path / "cache"))
    options = {**LIMITS, "cache": True}
    for writer in (stored.gptq(act_order=True), stored.gptq()):
        written = write_checkpoint(path, stored.tiny(), writer, GPTQ)
        engine = camshaft.compile(written.path, **options)
        assert "cached" not in engine.manifest.timings
        _check_tokens(written, engine)


def test_head_and_other_dtypes(path: Path) -> None:
    """A quantized head; config.json that names one layer as not quantized; bfloat16 weights."""
    writer = stored.awq()
    written = write_checkpoint(
        path, stored.tiny(), writer, AWQ, name_of=lambda name: None if "down" in name else writer
    )
    tensors = load_file(written.path / "model.safetensors")
    head = writer(tensors.pop("lm_head.weight"))
    tensors |= {f"lm_head.{name}": tensor.contiguous() for name, tensor in head.tensors.items()}
    save_file(tensors, written.path / "model.safetensors")
    written.reference.lm_head.weight.data = head.dense
    engine = camshaft.compile(written.path, **LIMITS)
    assert _bound(engine) == 4  # qkv, o, gate_up and the head
    _check_tokens(written, engine)
    half = open_model(written.path, torch.bfloat16).weights[f"{Q}.weight"]
    assert half.stored is not None and half.dtype == torch.bfloat16
    assert torch.equal(half.load(), written.dense[f"{Q}.weight"].bfloat16())


def test_projections_with_other_input_scales_stay_apart(path: Path) -> None:
    def name_of(name: str) -> stored.Writer:
        return stored.fp8("tensor", static=0.02 if "k_proj" in name else 0.01)

    quantization = {"quant_method": "modelopt", "quant_algo": "FP8"}
    written = write_checkpoint(path, stored.tiny(), name_of("q"), quantization, name_of=name_of)
    engine = camshaft.compile(written.path, **LIMITS)
    assert _bound(engine) == 5  # q and v are joined, k is alone
    assert any("stay apart in 1 place" in line for line in engine.manifest.report)
    _check_tokens(written, engine)


def test_layers_of_several_schemes(path: Path) -> None:
    """Groups of compressed-tensors by pattern and by class; a KV cache's scales are left aside, and that is said."""
    quantization = _compressed("mixed-precision", _floats(8, "channel"), FLOAT)
    quantization["config_groups"]["group_0"]["format"] = "float-quantized"
    quantization["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$"], "weights": _ints(4, 32), "input_activations": None, "format": "pack-quantized",
    }  # fmt: skip
    quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    written = write_checkpoint(
        path, stored.tiny(), stored.fp8(), quantization,
        name_of=lambda name: stored.packed() if "down" in name else stored.fp8(),
    )  # fmt: skip
    tensors = load_file(written.path / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.k_scale": torch.tensor(1.0)}, written.path / "model.safetensors")
    engine = camshaft.compile(written.path, **LIMITS)
    assert _bound(engine) == 4
    text = "\n".join(engine.manifest.report)
    assert "6 layers are stored as fp8/fp8" in text and "1 layers are stored as int4:g32/none" in text
    assert "kv_cache_scheme is ignored" in text and "first model.layers.0.self_attn.k_scale" in text
    _check_tokens(written, engine)


def test_gpt_oss_experts(path: Path) -> None:
    model = stored.tiny("gpt_oss", head_dim=32, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64)
    written = write_checkpoint(path, model, stored.mxfp4, {"quant_method": "mxfp4"}, name_of=lambda name: None)
    tensors = load_file(written.path / "model.safetensors")
    state = written.reference.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dense = stored.pack_experts(tensors.pop(name))
        state[name].copy_(dense)
        written.dense[name] = dense
    save_file(tensors, written.path / "model.safetensors")
    weights = open_model(written.path, torch.float32).weights
    assert len(written.dense) == 2
    assert all(torch.equal(weights[name].load(), dense) for name, dense in written.dense.items())
    engine = camshaft.compile(written.path, **LIMITS)
    assert any("2 tensors of experts are dequantized" in line for line in engine.manifest.report)
    _check_tokens(written, engine)


def test_modelopt_file_and_mixed_precision(path: Path) -> None:
    """hf_quant_config.json alone, with an algorithm for each layer."""

    def name_of(name: str) -> stored.Writer:
        return stored.nvfp4("modelopt", static=2.0**-9) if "mlp" in name else stored.fp8("tensor", static=0.01)

    written = write_checkpoint(path, stored.tiny(), name_of("mlp"), {}, name_of=name_of)
    names = [name.removesuffix(".weight") for name in written.dense]
    layers = {name: {"quant_algo": "NVFP4" if "mlp" in name else "FP8"} for name in names}
    facts = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    file = written.path / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": facts}))
    engine = camshaft.compile(written.path, **LIMITS)
    assert _bound(engine) == 4
    _check_tokens(written, engine)


# ------------------------------------------------------------------------------------------------------------ bad input
def _rewrite(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors: dict[str, torch.Tensor | None] = {**load_file(path / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, path / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        ("awq", {f"{Q}.scales": None}, rf"model.safetensors lacks tensor '{Q}.scales' \(scales of groups\)"),
        ("awq", {f"{Q}.qzeros": torch.zeros(4, 15, dtype=torch.int32)}, r"qzeros' .* has shape \[4, 15\], allowed: \[4, 16\]"),
        ("awq", {f"{Q}.qweight": torch.zeros(128, 16)}, "qweight' .* is float32, allowed: int32"),
        ("awq", {f"{Q}.qweight": torch.zeros(128, dtype=torch.int32)}, r"qweight' has shape \[128\]; .* matrix"),
        ("awq", {f"{Q}.pre_scale": torch.ones(128)}, "pre_scale' belongs to a quantized layer"),
        ("awq", {f"{Q}.bias": torch.ones(128)}, "q_proj.bias' of the checkpoint is not zero"),
        ("gptq", {f"{Q}.g_idx": torch.zeros(128, dtype=torch.int32)}, "g_idx' puts 128 columns in groups of other sizes"),
        ("packed", {f"{Q}.weight_packed": torch.zeros(128, 15, dtype=torch.int32)}, r"allowed for weight_shape \[128, 128\]"),
        ("packed", {f"{Q}.weight_scale": torch.ones(128, 3)}, r"weight_scale' has shape \[128, 3\], allowed .*\[128, 4\]"),
        ("deepseek_fp8", {f"{Q}.weight_scale_inv": None}, f"lacks tensor '{Q}.weight_scale_inv'"),
        ("modelopt_fp8", {f"{Q}.input_scale": None}, f"lacks tensor '{Q}.input_scale'"),
        ("modelopt_nvfp4", {f"{Q}.weight_scale_2": torch.ones(2)}, r"weight_scale_2' .* has shape \[2\], allowed: one value"),
        ("nvfp4", {f"{Q}.weight_packed": torch.zeros(128, 60, dtype=torch.uint8)}, "group_size 16 does not divide its 120"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(scheme: str, change: dict[str, Any], message: str, path: Path) -> None:
    written = write_checkpoint(path, stored.tiny(), *SCHEMES[scheme][:2])
    _rewrite(written.path, change)
    with pytest.raises(ValueError, match=message):
        open_model(written.path, torch.float32)


def test_zero_points_that_are_not_symmetric(path: Path) -> None:
    written = write_checkpoint(path, stored.tiny(), stored.gptq(), {**GPTQ, "sym": True})
    weight = open_model(written.path, torch.float32).weights[f"{Q}.weight"]
    with pytest.raises(ValueError, match="q_proj.qzeros: zero points from .* says sym, for which they are all 8"):
        weight.load()


GROUP_0 = {"config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": _ints(3, 32)}}}


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        ("awq", {"quant_method": "bitsandbytes"}, "quantized as 'bitsandbytes', which is not known; known: awq, gptq, compressed"),
        ("awq", {"version": "gemv"}, "quantization_config of awq: version is 'gemv', allowed: 'gemm'"),
        ("awq", {"bits": 3}, "bits is 3, allowed: 4"),
        ("awq", {"group_size": 48}, "group_size 48 does not divide its 1"),
        ("gptq", {"bits": 2}, "bits is 2, allowed: 4, 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', allowed: 'gptq', 'gptq_v2'"),
        ("packed", GROUP_0, "config_groups.group_0: weights are int3 by group"),
        ("packed", {"format": "marlin-24"}, "format is 'marlin-24', allowed: float-quantized"),
        ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format is 'sparse-24-bitmask'"),
        ("modelopt_fp8", {"quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ', allowed: FP8"),
        ("deepseek_fp8", {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\], allowed: \[128, 128\]"),
    ],
)  # fmt: skip
def test_settings_that_are_not_known(scheme: str, change: dict[str, Any], message: str, path: Path) -> None:
    writer, quantization, _, _ = SCHEMES[scheme]
    written = write_checkpoint(path, stored.tiny(), writer, {**quantization, **change})
    with pytest.raises(ValueError, match=message):
        open_model(written.path, torch.float32)


def test_quantizing_again_is_refused(path: Path) -> None:
    written = write_checkpoint(path, stored.tiny(), *SCHEMES["awq"][:2])
    with pytest.raises(ValueError, match=r"quantize is .*fp8.*, and the checkpoint model is quantized already \(awq\)"):
        camshaft.compile(written.path, **LIMITS, quantize="fp8")


def test_nothing_is_read_before_it_is_asked_for(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads what decides about the graph alone: orders, single scales, shapes."""
    from camshaft.models import checkpoint

    read: list[str] = []
    original = checkpoint._reader

    def reader(file: Path, name: str) -> Any:
        load = original(file, name)
        return lambda: (read.append(name), load())[1]

    monkeypatch.setattr(checkpoint, "_reader", reader)
    written = write_checkpoint(path, stored.tiny(), *SCHEMES["gptq"][:2])
    weights = open_model(written.path, torch.float32).weights
    assert {name.rsplit(".", 1)[1] for name in read} == {"g_idx"}
    read.clear()
    weights[f"{Q}.weight"].stored_part("values").load()
    assert read == [f"{Q}.qweight"]


def test_the_program_reads_what_is_stored(path: Path) -> None:
    written = write_checkpoint(path, stored.tiny(), *SCHEMES["awq"][:2])
    engine = camshaft.compile(written.path, **LIMITS)
    bits = 8 * sum(weight.num_bytes for name, weight in engine.weights.items() if "_proj" in name)
    count = sum(dense.numel() for dense in written.dense.values())
    assert bits / count == 4 + (32 + 8) / 32


@pytest.mark.parametrize(
    ("missing", "bound", "note"),
    [
        ("nvfp4", 4, "4 layers in nvfp4/nvfp4, for which a test has no kernel (none): activations stay as they are"),
        (
            "",
            0,
            "4 layers in nvfp4/nvfp4, for which a test has no kernel (none): they are dequantized, and activations",
        ),
    ],
)
def test_formats_without_kernels(missing: str, bound: int, note: str, path: Path) -> None:
    """A target that must have kernels computes with the stored weights alone, or with dense ones."""
    written = write_checkpoint(
        path, stored.tiny(), stored.nvfp4("modelopt", static=2.0**-9), SCHEMES["modelopt_nvfp4"][1]
    )
    kernels = KernelSupport(
        where="a test", required=True, missing=lambda format, shape: "none" if missing in format.activations else None
    )
    program = huggingface.trace_decoder(open_model(written.path, torch.float32))
    program = PassManager(decoder_passes(block_size=16, kernels=kernels)).run(program)
    assert sum(record.num_matches for record in program.history if record.name == "bind_stored_weights") == bound
    assert any(note in line for line in program.info["notes"])
    assert not any(spec.key.endswith(".input_scale") for spec in program.inputs)
