"""The bundled demo model: sizes, tokenizer, chat template, and that its text reads like text."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from camshaft.models import demo
from camshaft.models.demo.evaluate import perplexity
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.path())


def test_sizes():
    assert (demo.path() / "model.safetensors").stat().st_size <= 16_000_000
    assert (demo.draft_path() / "model.safetensors").stat().st_size <= 2_500_000
    for folder in (demo.heads_path(), demo.eagle_path(), demo.exit_path()):
        (file,) = folder.glob("*.safetensors")
        assert file.stat().st_size <= 4_000_000
    assert sum(p.stat().st_size for p in demo.path().parent.rglob("*") if p.is_file()) < 28_000_000


def test_paths_need_no_torch():
    code = (
        "import sys; from camshaft.models import demo; demo.path(); demo.prompts(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_same_tokenizer_for_the_draft():
    name = "tokenizer.json"
    assert (demo.path() / name).read_bytes() == (demo.draft_path() / name).read_bytes()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= token < 4096 for token in ids)


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Be brief.\n\nHi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|>"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]) == [0, 1, 2, 3]
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_prompts():
    prompts = demo.prompts()
    assert len(prompts) >= 30
    assert all(("text" in p) != ("chat" in p) for p in prompts)


@pytest.mark.parametrize(("folder", "bound"), [(demo.path(), 12.5), (demo.draft_path(), 20.2)])
def test_perplexity(folder, bound):
    text = demo.heldout_path().read_text(encoding="utf-8")
    assert perplexity(folder, text, max_tokens=2000)["perplexity"] < bound


def _continue(tokenizer, prompt: str, tokens: int) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.path())
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_text_reads_like_text(tokenizer):
    vocabulary = set(re.findall(r"[a-z]+", demo.heldout_path().read_text(encoding="utf-8").lower()))
    words = re.findall(r"[a-z]+", _continue(tokenizer, "Debian is a free operating system that", 60).lower())
    assert len(words) > 25
    assert sum(word in vocabulary for word in words) > 0.85 * len(words)


def test_chat_answer_ends(tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True
    )
    assert _continue(tokenizer, prompt, 60).endswith("<|end|>")
