"""The tokenizer read from a checkpoint's files, and chat templates."""

import subprocess
import sys

import pytest
from camshaft.runtime.tokenizer import Tokenizer

from .small_tokenizers import CHATML, byte_level, save

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def make(tmp_path):
    def build(**config):
        return Tokenizer.from_dir(save(byte_level(), tmp_path, **config))

    return build


def test_round_trip_and_special_tokens(make):
    tokenizer = make()
    ids = tokenizer.encode("Grüße 你好 🙂")
    assert ids[0] == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids) == "Grüße 你好 🙂"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>Grüße 你好 🙂"
    assert tokenizer.encode("a", add_special_tokens=False) == ids_of(tokenizer, "a")
    assert tokenizer.encode_batch(["a", "b"]) == [tokenizer.encode("a"), tokenizer.encode("b")]
    assert tokenizer.special_token_ids == {0, 1, 2, 3}
    assert tokenizer.decode_token(1) == "</s>" and tokenizer.id_to_token(1) == "</s>"


def ids_of(tokenizer, text):
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_chat_template_from_config(make):
    tokenizer = make(chat_template=CHATML)
    text = tokenizer.render_chat(MESSAGES)
    assert text == (
        "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    ).replace("<|im_end|>\n<|im_start|>", "<|im_end|><|im_start|>")
    assert tokenizer.apply_chat_template(MESSAGES) == tokenizer.encode(text, add_special_tokens=False)
    assert not tokenizer.render_chat(MESSAGES, add_generation_prompt=False).endswith("assistant\n")


def test_damaged_configs_are_refused_and_missing_ones_are_not(make, tmp_path):
    make()
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON .*; download the tokenizer again"):
        Tokenizer.from_dir(tmp_path)
    config.unlink()
    assert Tokenizer.from_dir(tmp_path).special_tokens == {}


def test_template_file_wins_over_config_and_named_templates(make, tmp_path):
    tokenizer = make(chat_template=[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    assert tokenizer.render_chat(MESSAGES) == "D"
    assert tokenizer.render_chat(MESSAGES, template="tool_use") == "T"
    assert tokenizer.render_chat(MESSAGES, template="{{ bos_token }}!") == "<s>!"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_dir(tmp_path).render_chat(MESSAGES) == "F"


def test_names_that_templates_expect(make):
    source = (
        "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') | length }}{{ {'a': '<é>'} | tojson }}"
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
        "{% generation %}G{% endgeneration %}{% if tools is none %}N{% endif %}{{ enable_thinking }}"
    )
    assert make(chat_template=source).render_chat(MESSAGES, enable_thinking=True) == '<s></s>4{"a": "<é>"}userGNTrue'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only user turns') }}", "only user turns"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% if %}", "does not parse"),
        (None, "no chat template 'default' .it has: none"),
    ],
)
def test_refusals_are_value_errors(make, template, message):
    with pytest.raises(ValueError, match=message):
        make(**({"chat_template": template} if template else {})).render_chat(MESSAGES)


def test_bad_messages(make):
    tokenizer = make(chat_template=CHATML)
    with pytest.raises(ValueError, match="at least one message"):
        tokenizer.render_chat([])
    with pytest.raises(ValueError, match="message 1 is 'yes'"):
        tokenizer.render_chat([MESSAGES[0], "yes"])


def test_missing_or_broken_files(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json in .*nor any other"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"tokenizer.model, which Camshaft does not read"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read by tokenizers"):
        Tokenizer.from_dir(tmp_path)


def test_starts_without_transformers_or_torch(tmp_path):
    save(byte_level(), tmp_path, chat_template=CHATML)
    code = (
        "import sys; from camshaft.runtime.tokenizer import Tokenizer; "
        f"t = Tokenizer.from_dir({str(tmp_path)!r}); t.render_chat([dict(role='user', content='x')]); "
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
