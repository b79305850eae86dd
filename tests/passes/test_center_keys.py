"""center_keys: outputs stay, keys lose their mean, and attention that shifts change keeps its keys."""

from __future__ import annotations

import pytest
import torch
from calibration_cases import data, traced
from camshaft.graph.numerics import run_program
from camshaft.models.huggingface import open_model, trace_decoder
from camshaft.passes.center_keys import CenterKeys
from camshaft.passes.manager import PassManager
from camshaft.passes.match import is_call
from camshaft.passes.pipeline import cache_passes, canonicalize_passes, fuse_passes
from camshaft.passes.quantization.calibrator import Calibrator
from camshaft.passes.resolve_masks import ATTENTION
from families import random_model

INPUTS = {"token_ids": torch.arange(40)[None] * 3 % 128, "positions": torch.arange(40)[None]}
OBSERVER = Calibrator(data(), torch.device("cpu"))


def test_keys_lose_their_mean_and_outputs_stay() -> None:
    program = traced()
    centered = CenterKeys(OBSERVER)(program)
    assert centered.num_matches == 2 and centered.program.count(torch.ops.aten.sub.Tensor) == 2
    before, after = (run_program(p, INPUTS)[0] for p in (program, centered.program))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()  # float32
    keys = {node.args[1] for node in centered.program.graph.nodes if is_call(node, ATTENTION)}
    for _, pieces in OBSERVER.values_of(centered.program, keys):  # type: ignore[arg-type]
        tokens = torch.cat(list(pieces), 2)
        assert tokens.mean((0, 2)).abs().max() < 1e-5 < tokens.std()


def test_a_cap_on_scores_keeps_the_keys() -> None:
    import transformers

    model = random_model(
        transformers.Gemma2Config(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=128, max_position_embeddings=256, attn_logit_softcapping=30.0,
        )
    )  # fmt: skip
    program = PassManager([*canonicalize_passes(), *fuse_passes()]).run(trace_decoder(open_model(model, torch.float32)))
    kept = CenterKeys(OBSERVER)(program)
    assert kept.num_matches == 0
    assert "keys of 2 layers keep their mean in the cache" in kept.program.info["notes"][-1]


@pytest.mark.parametrize(
    ("dtype", "names"),
    [(None, []), (torch.float8_e4m3fn, ["center_keys"]), (torch.int8, ["scale_kv_cache"])],
    ids=str,
)
def test_what_a_cache_needs(dtype: torch.dtype | None, names: list[str]) -> None:
    assert [item.name for item in cache_passes(dtype, OBSERVER)] == names
    without = cache_passes(dtype, None)
    assert [item.name for item in without] == (names if dtype == torch.int8 else [])
