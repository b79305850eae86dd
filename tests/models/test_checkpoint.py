"""Checkpoints: lazily read, converted as Transformers does, and refused with one clear error where they do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.graph.capture import CaptureError
from camshaft.models.huggingface import open_model
from families import random_model, tiny_config
from safetensors.torch import load_file, save_file

import camshaft

LIMITS = {"max_seq_len": 64, "max_batch_tokens": 32, "max_sequences": 4, "target": "eager", "device": "cpu"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random_model(tiny_config("llama")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "gemma3", "bloom"])
def test_weights_equal_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    random_model(tiny_config(name)).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    weights = open_model(tmp_path, torch.float32).weights
    for key, tensor in expected.items():
        assert key in weights, key
        loaded = weights[key].load()
        assert weights[key].shape == tuple(tensor.shape)
        assert torch.equal(loaded, tensor), key


def test_shards(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(part, checkpoint / file)
        index["weight_map"].update(dict.fromkeys(part, file))
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(open_model(checkpoint, torch.float32).weights) >= len(names)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing file.*00002-of-00002"):
        open_model(checkpoint, torch.float32)


def test_truncated_file(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        camshaft.compile(checkpoint, **LIMITS)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file \(found pytorch_model.bin"):
        camshaft.compile(checkpoint, **LIMITS)


def test_missing_weight(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of .* first 'model.layers.1.mlp.up_proj.weight'"):
        camshaft.compile(checkpoint, **LIMITS)


def test_wrong_shape(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[65\], the config asks for \[64\]"):
        camshaft.compile(checkpoint, **LIMITS)


def test_unknown_architecture(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "no_such_model"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no_such_model"):
        camshaft.compile(checkpoint, **LIMITS)


def test_encoder_is_no_decoder(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vit' is not a decoder"):
        camshaft.compile(tmp_path, **LIMITS)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory"):
        camshaft.compile(tmp_path / "missing", **LIMITS)
    with pytest.raises(ValueError, match="has no config.json"):
        camshaft.compile(tmp_path, **LIMITS)
    with pytest.raises(ValueError, match="neither a directory here nor a model that the hub gave"):
        camshaft.compile("nobody/nothing", **LIMITS)


def test_plain_checkpoint_with_quantization_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantized \(awq\), and no layer of it is stored so"):
        camshaft.compile(checkpoint, **LIMITS)


def test_models_that_cannot_be_taken_name_what_stands_in_the_way() -> None:
    import transformers

    chunked = transformers.Llama4TextConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        head_dim=16,
        num_local_experts=4,
        max_position_embeddings=256,
    )
    with pytest.raises(CaptureError, match="chunked_attention|chunked_overlay"):
        camshaft.compile(random_model(chunked), **LIMITS)
    recurrent = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)
    with pytest.raises(CaptureError, match="MambaMixer keeps a recurrent"):
        camshaft.compile(random_model(recurrent), **LIMITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 300}, "max_seq_len is 300.*256 positions"),
        ({"max_seq_len": 1}, "max_seq_len is 1"),
        ({"max_sequences": 64}, "max_sequences is 64, more than max_batch_tokens"),
        ({"block_size": 0}, "block_size is 0"),
        ({"dtype": "int8"}, "dtype is int8; allowed"),
        ({"device": "tpu"}, "tpu|device"),
        ({"target": "magic"}, "unknown target 'magic'"),
    ],
)
def test_impossible_builds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        camshaft.compile(random_model(tiny_config("llama")), **{**LIMITS, **changes})


@pytest.mark.slow
def test_peak_memory_of_a_build(tmp_path: Path) -> None:
    """Building and saving a 1 GB model takes at most 1.3 times its weights, over what an imported torch takes."""
    script = textwrap.dedent("""
        import resource, sys, torch, transformers, camshaft
        from camshaft.models import huggingface
        from camshaft.export import build
        transformers.logging.set_verbosity_error()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        engine = camshaft.compile(sys.argv[1], target="eager", device="cpu", max_seq_len=64, cache=False)
        engine.save(sys.argv[2])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(before * 1024, peak * 1024, engine.weights_bytes)
    """)
    make = textwrap.dedent("""
        import sys, torch, transformers
        from safetensors.torch import save_file
        config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16,
            num_key_value_heads=8, vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True)
        with torch.device("meta"):
            shapes = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        del shapes["lm_head.weight"]
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(sys.argv[1])
        tensors = {name: torch.full(meta.shape, 0.01) for name, meta in shapes.items()}
        save_file(tensors, sys.argv[1] + "/model.safetensors", metadata={"format": "pt"})
    """)
    subprocess.run([sys.executable, "-c", make, str(tmp_path / "model")], check=True, timeout=300)
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "engine")]
    out = subprocess.check_output(command, text=True, timeout=300)
    before, peak, weights = map(int, out.split()[-3:])
    assert weights > 0.9e9
    assert peak - before < 1.3 * weights
    assert peak < 1.3 * weights + before
