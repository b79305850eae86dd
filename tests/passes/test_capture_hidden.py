"""capture_hidden: hidden states of decoders of many families are those that Transformers returns."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.numerics import run_program
from camshaft.graph.verify import verify
from camshaft.models import huggingface
from camshaft.models.huggingface import open_model
from camshaft.passes.capture_hidden import CaptureHidden
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import canonicalize_passes, decoder_passes, fuse_passes
from families import FAMILIES, random_model, tiny_config

TOKENS = torch.arange(1, 12)[None] * 7 % 120
NORMED = -1


def expected(model, layers):
    """Transformers' hidden states; its last one is behind the final norm."""
    seen = []
    last = find_last_layer(model)
    handle = last.register_forward_hook(
        lambda _, __, result: seen.append(result if torch.is_tensor(result) else result[0])
    )
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    states = [*states[:-1], seen[0], states[-1]]
    return [states[layer] for layer in layers]


def find_last_layer(model):
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    return lists[0][-1]


FAST = ("llama", "gpt2")


@pytest.mark.parametrize(
    "family", [*FAST, *(pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES) if name not in FAST)]
)
def test_states_of_a_family(family):
    model = random_model(tiny_config(family))
    layers = (2, 0, 1, NORMED)
    program = huggingface.trace_decoder(open_model(model, torch.float32))
    result = PassManager([CaptureHidden(layers), *canonicalize_passes(), *fuse_passes()]).run(program)
    record = result.history[0]
    assert (record.name, record.num_matches) == ("capture_hidden", 4)
    inputs = {"token_ids": TOKENS, "positions": torch.arange(TOKENS.shape[1])[None]}
    logits, *states = run_program(result, inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    for state, right in zip(states, expected(model, layers), strict=True):
        torch.testing.assert_close(state, right, rtol=1e-4, atol=1e-4)


def test_paged_program_keeps_the_outputs():
    program = huggingface.trace_decoder(open_model(random_model(tiny_config("llama")), torch.float32))
    result = PassManager(decoder_passes(block_size=4, hidden_layers=(1, NORMED))).run(program)
    verify(result, after="all")
    output = next(node for node in result.graph.nodes if node.op == "output")
    logits, *states = (node.meta["val"] for node in output.args[0])
    assert logits.shape[1] != states[0].shape[1]  # only the sampled rows have logits
    assert all(state.shape[2] == 64 for state in states)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((3,), "3 .*allowed: 0 .* to 2 "), ((-2,), "-2"), ((1, 1), "each layer once"), (("1",), "'1'"), ((True,), "True")],
)
def test_bad_layers(layers, message):
    program = huggingface.trace_decoder(open_model(random_model(tiny_config("llama")), torch.float32))
    with pytest.raises(ValueError, match=message):
        CaptureHidden(layers)(program)


def test_no_layers_to_find():
    program = huggingface.trace_decoder(open_model(random_model(tiny_config("llama")), torch.float32))
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(ValueError, match="no decoder layers are found"):
        CaptureHidden((1,))(program)


def test_other_widths_are_refused():
    config = tiny_config("opt")
    config.word_embed_proj_dim = 32
    program = huggingface.trace_decoder(open_model(random_model(config), torch.float32))
    with pytest.raises(ValueError, match=r"\[64, 32\] wide"):
        CaptureHidden((1, NORMED))(program)
