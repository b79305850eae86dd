"""Options of hidden states, early exits and self speculation."""

from __future__ import annotations

import pytest

from camshaft.cli.common import parse_exit, parse_layers
from camshaft.cli.speculative import speculative_config


def test_layers() -> None:
    assert parse_layers("2,4, -1") == [2, 4, -1] and parse_layers(None) is None
    for text in ("2,x", "", "1.5"):
        with pytest.raises(ValueError, match="--hidden-layers is"):
            parse_layers(text)


def test_exits() -> None:
    assert parse_exit("6") == 6 and parse_exit(None) is None and parse_exit("a/b") == "a/b"
    assert str(parse_exit("demo-exit")).endswith("camshaft-demo-exit")


def test_self() -> None:
    config = speculative_config("self", None, 6, 4, "exact", True)
    assert config is not None and (config.method, config.exit_layer, config.model) == ("self", 6, None)
    with pytest.raises(ValueError, match="--exit-layer 6 needs --speculative self"):
        speculative_config(None, None, 6, 4, "exact", True)
    with pytest.raises(ValueError, match="method 'ngram' has no exit_layer"):
        speculative_config("ngram", None, 6, 4, "exact", True)
