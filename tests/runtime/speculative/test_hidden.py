"""Hidden states come to a proposer once for every position that is computed, whatever happens to its request."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.step_outputs import StepOutputs
from camshaft.runtime import LLM, SamplingParams, SpeculativeConfig
from camshaft.runtime.speculative.hidden_rows import columns_of

from ..fake_engine import FakeEngine, expected_tokens
from .proposers import OracleProposer
from .test_llm import everything, run

NUMBER = {2: 0.0, 5: 1000.0, 7: 2000.0}
"""What the fake engine adds to the hidden states of a layer."""


class StatesEngine(FakeEngine):
    """Hidden state l of a token is [token + NUMBER[l], position]."""

    hidden_layers = (2, 5, 7)

    def step_outputs(self, batch):
        rows = torch.stack([batch.token_ids, batch.positions], dim=1).float()[:, None]
        offsets = torch.tensor([[NUMBER[layer], 0.0] for layer in self.hidden_layers])
        return StepOutputs(self.step(batch), rows + offsets)


class Reader(OracleProposer):
    """Checks every row; keeps which positions it has seen of which run of a request."""

    def __init__(self, context, rate=0.7, layers=(2, 5, 7)):
        super().__init__(context, rate, on_device=False)
        self.hidden_layers = layers
        self.next = {}
        self.begins = []
        self.chunks = 0

    def observe(self, verified):
        for item in verified:
            request = item.request
            if request.is_finished:
                assert item.hidden is None
                continue
            assert request.request_id in self.live and len(item.rows) == len(item.hidden)
            end = item.start + len(item.rows)
            assert end < request.num_tokens
            tokens = torch.tensor(request.all_token_ids[item.start : end])
            hidden = item.hidden
            for column, layer in enumerate(self.hidden_layers):
                assert torch.equal(hidden[:, column, 0], tokens + NUMBER[layer])
            assert hidden[:, 0, 1].tolist() == list(range(item.start, end))
            run = (request.request_id, request.num_preemptions)
            if run not in self.next:
                self.begins.append(item.start)
            assert self.next.get(run, item.start) == item.start, "each position once, in order"
            self.next[run] = end
            self.chunks += end < request.num_prompt_tokens


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turns", "asynchronous"])
@pytest.mark.parametrize("rate", [0.0, 0.7])
def test_every_row_once(asynchronous, rate):
    made = []

    def make(context):
        made.append(Reader(context, rate))
        return made[0]

    prompts, params = everything(5)
    config = SpeculativeConfig(method="custom", proposer=make)
    _, stats = run(
        StatesEngine(vocab_size=5, windows=(0, 7)), config, prompts, params,
        kv_cache_bytes=6000, max_chunk_tokens=9, policy="max_utilization", async_scheduling=asynchronous,
    )  # fmt: skip
    assert stats.scheduler.preemptions > 0 and stats.scheduler.prefix_hit_tokens > 0
    assert made[0].chunks > 5 and {0} < set(made[0].begins)  # some requests begin behind a prefix hit
    if rate and not asynchronous:
        assert sum(stats.speculative.accepted) > 0


def test_chosen_columns_in_the_proposers_order():
    made = []

    def make(context):
        made.append(Reader(context, layers=(7, 2)))
        return made[0]

    with LLM(StatesEngine(), speculative=SpeculativeConfig(method="custom", proposer=make)) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0))
    assert output.outputs[0].token_ids == expected_tokens([1, 2, 3], 32, 101)
    assert made[0].next


def test_engine_without_the_states():
    config = SpeculativeConfig(method="custom", proposer=lambda context: Reader(context, layers=(2, 9)))
    with pytest.raises(
        ValueError, match=r"reads hidden states \(2, 9\) .* compile it with hidden_layers=\(2, 5, 7, 9\)"
    ):
        LLM(StatesEngine(), speculative=config)
    with pytest.raises(ValueError, match=r"hidden_layers=\(\); compile it with hidden_layers=\(1,\)"):
        columns_of(FakeEngine(), (1,))
