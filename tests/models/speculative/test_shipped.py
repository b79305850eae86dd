"""The demo model's own drafts are whole and go with it."""

from __future__ import annotations

import json

from camshaft.models import demo
from camshaft.models.speculative.eagle import capture_layers, read_eagle
from camshaft.models.speculative.exit import read_exit
from camshaft.models.speculative.heads import read_heads

MODEL = json.loads((demo.path() / "config.json").read_text())


def test_heads():
    config = read_heads(demo.heads_path()).config
    assert (config.hidden_size, config.vocab_size) == (MODEL["hidden_size"], MODEL["vocab_size"])
    assert config.num_heads == 4


def test_eagle():
    draft = read_eagle(demo.eagle_path())
    layers = capture_layers(draft.config, MODEL["num_hidden_layers"])
    assert draft.fc.weight.shape == (MODEL["hidden_size"], len(layers) * MODEL["hidden_size"])
    assert draft.config.vocab_size == MODEL["vocab_size"] > draft.config.draft_vocab_size


def test_exit():
    head = read_exit(demo.exit_path())
    assert head.norm.weight.shape == (MODEL["hidden_size"],) and 0 < head.layer < MODEL["num_hidden_layers"]
