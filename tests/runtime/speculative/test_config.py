"""`SpeculativeConfig` and the LLM refuse what cannot work, and say what can."""

import pytest
from camshaft.runtime import LLM, SamplingParams, SpeculativeConfig
from camshaft.runtime.speculative.build import check_vocabulary

from ..fake_engine import FakeEngine
from ..small_tokenizers import byte_level, save


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "medusa"}, "method is 'medusa'; allowed: ngram, draft"),
        ({"method": "draft"}, "needs model=, a smaller engine"),
        ({"method": "heads"}, "needs model=, the directory"),
        ({"method": "ngram", "model": "x"}, "uses no model"),
        ({"method": "custom"}, "a proposer goes with method='custom'"),
        ({"method": "ngram", "proposer": len}, "a proposer goes with method='custom'"),
        ({"method": "ngram", "num_draft_tokens": 0}, "num_draft_tokens is 0; allowed: integers from 1 to 32"),
        ({"method": "ngram", "num_draft_tokens": True}, "num_draft_tokens is True"),
        ({"method": "ngram", "acceptance": "greedy"}, "acceptance is 'greedy'; allowed: rejection, exact, typical"),
        ({"method": "ngram", "tree": ((0,),)}, "lengths adapt for chains alone: set adaptive=False"),
        ({"method": "ngram", "ngram_min": 0}, "ngram_min is 0"),
        ({"method": "ngram", "adaptive": 1}, "adaptive is 1; allowed: True or False"),
        ({"method": "ngram", "typical_epsilon": 0.0}, r"typical_epsilon is 0.0; allowed: numbers in \(0, 1\]"),
        ({"method": "ngram", "adaptive": False, "tree": ()}, "tree is"),
        ({"method": "ngram", "adaptive": False, "tree": ((0, 0),)}, r"path \(0, 0\) and not \(0,\)"),
        ({"method": "ngram", "adaptive": False, "tree": ((1,),)}, r"path \(1,\) and not \(0,\)"),
        (
            {"method": "ngram", "adaptive": False, "num_draft_tokens": 1, "tree": ((0,), (0, 0))},
            "1 to num_draft_tokens=1 choices",
        ),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**fields)


def test_trees_are_sorted_by_depth():
    config = SpeculativeConfig(method="ngram", adaptive=False, tree=[[0, 0], [1], [0]])
    assert config.tree == ((0,), (1,), (0, 0))


def test_drafts_that_do_not_fit_a_step():
    engine = FakeEngine(max_batch_tokens=10, max_sequences=8)
    with pytest.raises(
        ValueError, match=r"num_draft_tokens is 3 .* at most 10 tokens, 8 of them .* allowed: at most 2"
    ):
        LLM(engine, speculative=SpeculativeConfig(method="ngram", num_draft_tokens=3))
    with pytest.raises(ValueError, match="max_seq_len is 5; draft fewer"):
        LLM(FakeEngine(max_seq_len=5), speculative=SpeculativeConfig(method="ngram"))
    with LLM(engine, speculative=SpeculativeConfig(method="ngram", num_draft_tokens=2)):
        pass


def test_llm_without_speculation():
    with LLM(FakeEngine()) as llm:
        with pytest.raises(ValueError, match="speculative is True and this LLM does not speculate"):
            llm.generate([1, 2], SamplingParams(speculative=True))
        output = llm.generate([1, 2], SamplingParams(speculative=False, max_tokens=2))[0]
        assert output.metrics.speculative is None and llm.stats().speculative is None
    with pytest.raises(ValueError, match="speculative is a dict; allowed: SpeculativeConfig"):
        LLM(FakeEngine(), speculative={"method": "ngram"})
    with pytest.raises(ValueError, match="speculative is 1; allowed: True, False, or None"):
        SamplingParams(speculative=1)


def test_methods_that_an_engine_cannot_serve():
    engine = FakeEngine()
    with pytest.raises(ValueError, match="built without an early exit; compile it with early_exit=a number of layers"):
        LLM(engine, speculative=SpeculativeConfig(method="self"))
    with pytest.raises(ValueError, match="method 'ngram' drafts chains and tree is"):
        LLM(engine, speculative=SpeculativeConfig(method="ngram", adaptive=False, tree=((0,), (1,))))
    with LLM(engine):  # the failed LLMs have let go of it
        pass


def draft_llm(draft, target=None):
    return LLM(target or FakeEngine(), speculative=SpeculativeConfig(method="draft", model=draft))


def test_draft_models_that_do_not_go_with_the_target(tmp_path):
    target = FakeEngine()
    for draft, message in [
        (target, "the draft model is the target's own engine"),
        (FakeEngine(vocab_size=99), "a vocabulary of 99 tokens and the target of 101"),
        (FakeEngine(block_size=8), "blocks of 8 tokens and the target of 4"),
        (FakeEngine(max_seq_len=100), "built for max_seq_len=100 and the target for 256"),
        (FakeEngine(max_sequences=4), "built for max_sequences=4 and the target for 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            draft_llm(draft, target)
    with pytest.raises(ValueError, match="all layers of the target have windows"):
        draft_llm(FakeEngine(), FakeEngine(windows=(7,)))
    draft = FakeEngine()
    with draft_llm(draft, target), pytest.raises(ValueError, match="serves another LLM"):
        draft_llm(draft, FakeEngine())
    with LLM(draft):
        pass


def test_other_tokenizers(tmp_path):
    mine = save(byte_level(), tmp_path / "mine")
    same = save(byte_level(), tmp_path / "same")
    other = byte_level()
    other.add_tokens(["<another>"])
    theirs = save(other, tmp_path / "theirs")
    target = FakeEngine(vocab_size=340, tokenizer_path=mine)
    check_vocabulary(FakeEngine(vocab_size=352, tokenizer_path=same), target)  # padded otherwise
    with pytest.raises(
        ValueError, match=r"differs from the target's in 1 tokens \('<another>' is \d+ there and None here"
    ):
        check_vocabulary(FakeEngine(vocab_size=340, tokenizer_path=theirs), target)
