"""Medusa's heads: published checkpoints are read as they are written, and what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from camshaft.models.speculative.checkpoint import read_tensors
from camshaft.models.speculative.heads import HeadsConfig, MedusaHeads, read_heads, write_heads
from safetensors.torch import load_file, save_file


def heads_of(shared: bool = False) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(HeadsConfig(num_heads=3, num_layers=2, hidden_size=8, vocab_size=20, shared_head=shared))
    for parameter in heads.parameters():
        parameter.data = torch.randn_like(parameter).bfloat16().float()
    return heads


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_written_is_read(tmp_path, shared):
    heads = heads_of(shared)
    write_heads(heads, tmp_path, base_model_name_or_path="demo")
    found = read_heads(tmp_path)
    assert found.config == heads.config
    hidden = torch.randn(5, 8)
    expected = torch.stack([head(hidden) for head in heads], dim=1)
    assert expected.shape == (5, 3, 20)
    torch.testing.assert_close(found.float()(hidden), expected)
    torch.testing.assert_close(heads(hidden), expected)
    names = set(load_file(tmp_path / "medusa_lm_head.safetensors"))
    assert names == {f"{k}.{j}.linear.{part}" for k in range(3) for j in range(2) for part in ("weight", "bias")} | {
        f"{k}.2.weight" for k in range(1 if shared else 3)
    }
    assert json.loads((tmp_path / "config.json").read_text())["medusa_num_heads"] == 3


def test_blocks_are_residual():
    head = MedusaHeads(HeadsConfig(num_heads=1, num_layers=1, hidden_size=4, vocab_size=6))[0]
    x = torch.randn(3, 4)
    torch.testing.assert_close(head(x), head[1](x))  # the identity when it is made
    head[0].linear.weight.data.copy_(torch.eye(4))
    torch.testing.assert_close(head(x), head[1](x + torch.nn.functional.silu(x)))


def test_files_of_torch_and_names_with_the_list(tmp_path):
    heads = heads_of()
    write_heads(heads, tmp_path)
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    torch.save({f"medusa_head.{n}": v for n, v in heads.state_dict().items()}, tmp_path / "medusa_lm_head.pt")
    hidden = torch.randn(2, 8)
    torch.testing.assert_close(read_heads(tmp_path)(hidden), heads(hidden))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_heads(tmp_path)
    heads = heads_of()
    write_heads(heads, tmp_path)
    file, config = tmp_path / "medusa_lm_head.safetensors", tmp_path / "config.json"
    facts = json.loads(config.read_text())
    tensors = load_file(file)
    config.write_text(json.dumps({**facts, "medusa_num_heads": 4}))
    with pytest.raises(ValueError, match=r"lacks 5 of 20 tensors, first '3\.0\.linear\.bias'"):
        read_heads(tmp_path)
    config.write_text(json.dumps({**facts, "medusa_num_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks '0\.3\.weight', the lm_head of head 0"):
        read_heads(tmp_path)
    config.write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match=r"medusa_num_heads is None; allowed: integers >= 1"):
        read_heads(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_heads(tmp_path)
    config.write_text(json.dumps(facts))
    save_file({**tensors, "1.2.weight": torch.zeros(21, 8)}, file)
    with pytest.raises(ValueError, match=r"1\.2\.weight is \[21, 8\], and config\.json makes it \[20, 8\]"):
        read_heads(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_heads(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="holds no"):
        read_tensors(tmp_path)
    (tmp_path / "heads.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no file of tensors"):
        read_tensors(tmp_path)
