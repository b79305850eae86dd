"""bisect: deliberately wrong passes, targets and engines are found and named; right ones pass."""

import dataclasses
import math

import pytest
import torch
from camshaft.export.bisect import bisect_target, check_engine
from camshaft.export.targets.base import Built, LoweringError
from camshaft.export.targets.eager import EagerTarget
from camshaft.graph.weights import Weight, WeightMap
from camshaft.models.huggingface import open_model
from camshaft.passes.base import GraphPass, Stage
from camshaft.passes.bisect import bisect_passes, relative_error, run_row
from camshaft.passes.pipeline import decoder_passes
from shared_traces import trace_decoder

import camshaft

CPU = torch.device("cpu")
RMS_NORM = torch.ops.camshaft.rms_norm.default
GLU = torch.ops.camshaft.glu.default


@pytest.fixture(scope="module")
def model():
    """Sliding windows and grouped heads, random weights."""
    import transformers

    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.fixture(scope="module")
def program(model):
    return trace_decoder(open_model(model, torch.float32))


@pytest.fixture(scope="module")
def found(program):
    return bisect_passes(program, decoder_passes(block_size=8), tolerance=1e-4)


class WrongEps(GraphPass):
    """Changes the epsilon of the first norm."""

    name = "wrong_eps"
    stage = Stage.FUSE

    def run(self, program):
        node = next(node for node in program.graph.nodes if node.target is RMS_NORM)
        node.update_arg(2, 0.5)
        return 1


class DropsExampleValue(GraphPass):
    """Leaves a node without meta["val"]."""

    name = "drops_example_value"
    stage = Stage.FUSE

    def run(self, program):
        node = next(node for node in program.graph.nodes if node.target is RMS_NORM)
        del node.meta["val"]
        return 1


class WrongGlu(EagerTarget):
    """Runs every segment with a gated layer ten percent too large, from its second use on."""

    name = "wrong_glu"

    def load(self, segment, engine, device):
        lowered = super().load(segment, engine, device)
        if not any("glu" in name for name in segment.operators):
            return lowered
        count = 0

        class Wrong:
            def bind(self, weights):
                nonlocal count
                bound, scale = lowered.bind(weights), 1.1 if count else 1.0
                count += 1
                return lambda *inputs: [value * scale for value in bound(*inputs)]

        return Wrong()


class RefusesHead(EagerTarget):
    """Cannot lower the last segment."""

    name = "refuses_head"
    extension = "bin"

    def lower(self, segment, request):
        if any("index_select" in name for name in segment.operators):
            raise LoweringError("index_select is too much for refuses_head")
        return Built(b"x")


def test_right_passes_agree_with_the_model(model, program, found):
    assert found.first_bad is None
    assert [check.name for check in found.checks] == [p.name for p in decoder_passes(block_size=8)]
    assert [check.index for check in found.checks] == list(range(1, len(found.checks) + 1))
    tokens = torch.randint(0, 96, (20,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert relative_error(expected, run_row(program, tokens)) < 1e-5
    assert relative_error(expected, run_row(found.program, tokens)) < 1e-5


def test_first_wrong_pass_is_named(program):
    passes = decoder_passes(block_size=8)
    passes.insert(6, WrongEps())
    seen = []
    found = bisect_passes(program, passes, tolerance=1e-4, on_check=seen.append)
    assert found.first_bad is not None
    assert (found.first_bad.name, found.first_bad.index) == ("wrong_eps", 7)
    assert found.first_bad.error > 1e-3 and found.first_bad.problem is None
    assert all(check.ok for check in found.checks[:6])
    assert seen == list(found.checks) and len(seen) == len(passes)


def test_illegal_program_ends_the_search(program):
    passes = [*decoder_passes(block_size=8)[:6], DropsExampleValue(), *decoder_passes(block_size=8)[6:]]
    found = bisect_passes(program, passes, tolerance=1e-4)
    assert found.first_bad is not None and len(found.checks) == 7
    assert found.first_bad.name == "drops_example_value"
    assert "carries no example value" in (found.first_bad.problem or "") and math.isinf(found.first_bad.error)
    assert found.program.cache is None


def test_target_agrees_step_by_step(found):
    result = bisect_target(found.program, "eager", device=CPU, tolerance=1e-4)
    assert result.ok and result.first_bad is None
    assert [c.what for c in result.checks] == ["segment", "attention"] * 3 + ["segment"]
    assert [c.step for c in result.checks] == list(range(7))


def test_wrong_segment_of_a_target_is_named(found):
    result = bisect_target(found.program, WrongGlu(), device=CPU, tolerance=1e-4)
    bad = result.first_bad
    assert bad is not None and not result.ok and result.target == "wrong_glu"
    assert bad.what == "segment" and "glu" in bad.operators and bad.error == pytest.approx(0.1, rel=0.01)
    assert bad.step == 4  # steps 0 .. 3: embedding, attention, first layer (right), attention
    assert [c.step for c in result.checks if not c.ok] == [4]  # later ones are right on the oracle's inputs
    assert result.logits_error > 1e-4  # and the error is seen at the end


def test_segment_that_cannot_be_lowered_is_named(found):
    result = bisect_target(found.program, RefusesHead(), device=CPU, tolerance=1e-4)
    bad = result.first_bad
    assert bad is not None and bad.step == 6
    assert bad.problem == "index_select is too much for refuses_head"
    assert math.isinf(result.logits_error)


def test_unavailable_target_is_refused(found):
    with pytest.raises(ValueError, match="unknown target"):
        bisect_target(found.program, "nonsense", device=CPU, tolerance=1e-4)


@pytest.fixture(scope="module")
def engine(model):
    return camshaft.compile(
        model, target="eager", device="cpu", max_seq_len=64, max_batch_tokens=32, max_sequences=2, block_size=8, cache=False,
        progress=False,
    )  # fmt: skip


def test_engine_check_passes_and_sees_changed_weights(engine, program):
    check = check_engine(engine, program)
    assert check.ok and check.num_equal == 16 == len(check.tokens) and check.logits_error < 1e-4
    name = next(name for name in engine.plan.weight_names if "down_proj" in name)
    weights = dict(engine.weights)
    weights[name] = Weight.from_tensor(weights[name].load() * 1.2)
    changed = type(engine)(engine.manifest, engine.plan, WeightMap(weights), engine.engine_dir, None)
    check = check_engine(changed, program)
    assert not check.ok and check.logits_error > 1e-3


def test_ties_count_as_agreement(engine, program):
    check = check_engine(engine, program)
    other = dataclasses.replace(check, expected_tokens=(check.expected_tokens[0] ^ 1, *check.expected_tokens[1:]))
    assert not other.ok and dataclasses.replace(other, num_ties=1).ok


def test_relative_error_is_inf_for_nan_and_other_shapes():
    ones = torch.ones(3)
    assert relative_error(ones, ones) == 0 and relative_error(ones * 4, ones * 3) == 0.25
    assert math.isinf(relative_error(ones, ones * float("nan"))) and math.isinf(relative_error(ones, torch.ones(4)))
    assert relative_error(torch.ones(0), torch.ones(0)) == 0
