"""split_early_exit: the parts of a program compute what the whole one does, each layer once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from camshaft.export.partition import partition
from camshaft.export.quantization import resolve_recipe
from camshaft.export.segment import Plan
from camshaft.export.targets.base import get_target
from camshaft.graph.dump import program_text
from camshaft.graph.weights import Weight
from camshaft.models import huggingface
from camshaft.models.huggingface import open_model
from camshaft.passes.bisect import run_row
from camshaft.passes.fuse_norm_quantize import ADD_RMS_NORM_QUANTIZE
from camshaft.passes.manager import PassManager
from camshaft.passes.page_attention import PAGED_ATTENTION
from camshaft.passes.pipeline import decoder_passes
from camshaft.passes.split_early_exit import ExitWeights
from families import random_model, tiny_config

TOKENS = torch.arange(1, 12) * 7 % 120


def split(family, layer=1, **options):
    model = random_model(tiny_config(family))
    program = huggingface.trace_decoder(open_model(model, torch.float32))
    return model, PassManager(decoder_passes(block_size=4, early_exit=layer, **options)).run(program)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parts(family):
    model, program = split(family)
    assert [r.name for r in program.history if "exit" in r.name] == ["mark_exit", "split_early_exit"]
    assert list(program.parts) == ["early", "exit", "late"]
    early, head, late = program.parts.values()
    assert [part.count(PAGED_ATTENTION) for part in program.parts.values()] == [1, 0, 1]
    assert {spec.key for _, spec in late.placeholders("cache")} == {"k.1", "v.1"}
    linear = Counter(str(n.target) for n in program.graph.nodes)["aten.linear.default"]
    parts = [Counter(str(n.target) for n in part.graph.nodes)["aten.linear.default"] for part in (early, head, late)]
    assert parts[0] + parts[2] == linear and parts[1] == 1  # the head again, and no layer
    assert {spec.name for spec in head.inputs if spec.kind != "weight"} == {"hidden", "sample_rows"}
    assert "late" in program_text(program)
    for part in program.parts.values():
        assert all(part.weights[key] is program.weights[key] for key in part.weights)

    whole = run_row(program, TOKENS)
    hidden = run_row(early, TOKENS)
    assert torch.equal(run_row(late, TOKENS, hidden=hidden), whole)
    body = getattr(model, "model", None) or model.transformer
    norm = body.norm if hasattr(body, "norm") else body.ln_f
    with torch.no_grad():
        expected = model.lm_head(norm(hidden))
    torch.testing.assert_close(run_row(head, TOKENS, hidden=hidden), expected, rtol=1e-5, atol=1e-5)


def test_quantized_layers_are_shared(monkeypatch):
    monkeypatch.setattr("camshaft.passes.quantize_fp8.MIN_WEIGHTS", 0)
    _, program = split("llama", quantize=resolve_recipe("fp8"))
    assert program.count(ADD_RMS_NORM_QUANTIZE) == 3 and program.parts["late"].count(ADD_RMS_NORM_QUANTIZE) == 1
    hidden = run_row(program.parts["early"], TOKENS)
    assert torch.equal(run_row(program.parts["late"], TOKENS, hidden=hidden), run_row(program, TOKENS))


@pytest.mark.parametrize("layer", [0, 2, -1, True, 1.5])
def test_exit_out_of_range(layer):
    with pytest.raises(ValueError, match=r"early_exit is .* allowed: 1 .* to 1, since it has 2 layers"):
        split("llama", layer)


def exit_weights(hidden_size=64, rank=8):
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(shape, generator=generator) for shape in ((hidden_size,), (rank, hidden_size), (hidden_size, rank))
    ]
    return made, ExitWeights(*(Weight.from_tensor(t) for t in made), eps=1e-5)


def test_trained_exit():
    (norm, down, up), weights = exit_weights()
    model, program = split("llama", exit_weights=weights)
    hidden = run_row(program.parts["early"], TOKENS)
    with torch.no_grad():
        adapted = hidden + torch.nn.functional.silu(hidden @ down.T) @ up.T
        expected = model.lm_head(torch.nn.functional.rms_norm(adapted, (64,), norm, 1e-5))
    torch.testing.assert_close(run_row(program.parts["exit"], TOKENS, hidden=hidden), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run_row(program.parts["late"], TOKENS, hidden=hidden), run_row(program, TOKENS))
    assert {"exit.norm.weight", "exit.down.weight", "exit.up.weight"} <= set(program.all_weights) - set(program.weights)


def test_trained_exit_of_another_model():
    with pytest.raises(ValueError, match="for hidden states of 32, .* have 64"):
        split("llama", exit_weights=exit_weights(32)[1])
    with pytest.raises(ValueError, match="leave its checkpoint out"):
        split("gpt2", exit_weights=exit_weights()[1])


def test_plans_share_segments():
    _, program = split("llama")
    target = get_target("onnxruntime")
    plan = partition(program, target.supports)
    before = set(plan.segments)
    for name, part in program.parts.items():
        plan.add_part(name, partition(part, target.supports))
    assert before < set(plan.segments)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    draft = plan.parts["early"].then(plan.parts["exit"], {"hidden": plan.parts["early"].outputs[0]})
    assert draft.inputs == ["token_ids", "positions", "sample_rows"] and len(draft.outputs) == 2
    assert draft.has_logits and not plan.parts["early"].has_logits


def test_rope_inside_attention():
    """As on CUDA: each part computes the angles that its attention turns queries and keys by."""
    _, program = split("llama", fuse_rope=True)
    hidden = run_row(program.parts["early"], TOKENS)
    assert torch.equal(run_row(program.parts["late"], TOKENS, hidden=hidden), run_row(program, TOKENS))
    target = get_target("onnxruntime")
    early, head = (partition(program.parts[name], target.supports) for name in ("early", "exit"))
    assert len(early.then(head, {"hidden": early.outputs[0]}).outputs) == 2
