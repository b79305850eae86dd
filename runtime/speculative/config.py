"""What a user says about speculation: `SpeculativeConfig`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from .proposer import Proposer, ProposerContext

Method = Literal["ngram", "draft", "self", "heads", "eagle", "custom"]
"""Where drafts come from; "custom": from a proposer of the caller's own."""
Acceptance = Literal["rejection", "exact", "typical"]
"""Which drafts are accepted; greedy requests always accept exactly the target's own tokens."""
METHODS: tuple[str, ...] = get_args(Method)
ACCEPTANCES: tuple[str, ...] = get_args(Acceptance)
MAX_DRAFT_TOKENS = 32
"""Largest num_draft_tokens."""
MAX_TREE_NODES = 48
"""Most drafts of a tree: a row's mask has 64 bits, and tokens to catch up on may come first."""
MAX_EXIT_LAYER = 4096
"""Largest exit_layer; the model's own limit is checked with it."""
_NEEDS_MODEL = ("draft", "heads", "eagle")


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How an LLM speculates. Every field is checked when the config is made, which raises ValueError."""

    method: Method
    """ngram: the text's own repetitions (prompt lookup). draft: a smaller model with the same tokenizer. self: the first layers
    of the model itself. heads, eagle: small networks on its hidden states. custom: `proposer`."""
    num_draft_tokens: int = 4
    """Most tokens drafted for a request in a step, 1 to 32; for a tree, its depth."""
    model: object | None = None
    """draft: the smaller model, an engine or what `camshaft.LLM` takes as one. heads, eagle: the checkpoint's directory. self: that
    of a trained exit, where the LLM compiles the model and the exit is to have a norm of its own."""
    exit_layer: int | None = None
    """self: how many of the model's layers draft; None: as many as its engine was built with, see `camshaft.compile`."""
    tree: tuple[tuple[int, ...], ...] | None = None
    """Shape of a token tree, as paths of choices by rank: ((0,), (1,), (0, 0)) drafts the two likeliest tokens, and one after
    the first. None: chains."""
    acceptance: Acceptance = "rejection"
    """How drafts of requests with temperature are accepted. rejection: so that outputs have the target's distribution
    (Leviathan et al. 2023; Chen et al. 2023). exact: only drafts that plain decoding would have drawn with the same seed, so
    that outputs are its tokens. typical: drafts that are likely enough, which is not the target's distribution (Cai et al.
    2024, section 2.3.1)."""
    adaptive: bool = True
    """Whether each request's number of drafts follows its measured acceptance and the measured time of steps, down to none;
    False: always num_draft_tokens."""
    ngram_min: int = 2
    """ngram: shortest repetition that drafts are taken from, in tokens, >= 1."""
    typical_epsilon: float = 0.09
    """typical: probability from which a draft is always accepted, in (0, 1]."""
    typical_delta: float = 0.3
    """typical: share of exp(-entropy) from which a draft is accepted where the target is unsure, in (0, 1]."""
    proposer: Callable[[ProposerContext], Proposer] | None = None
    """custom: makes the proposer for an LLM."""

    def __post_init__(self) -> None:
        self._check_choice("method", self.method, METHODS)
        self._check_choice("acceptance", self.acceptance, ACCEPTANCES)
        _check_int("num_draft_tokens", self.num_draft_tokens, 1, MAX_DRAFT_TOKENS)
        _check_int("ngram_min", self.ngram_min, 1, 1024)
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive is {self.adaptive!r}; allowed: True or False")
        for name in ("typical_epsilon", "typical_delta"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ValueError(f"{name} is {value!r}; allowed: numbers in (0, 1]")
            assert math.isfinite(value)
        self._check_sources()
        if self.tree is not None:
            if self.adaptive:
                raise ValueError(
                    "tree is given and adaptive is True; lengths adapt for chains alone: set adaptive=False"
                )
            object.__setattr__(self, "tree", check_tree(self.tree, self.num_draft_tokens))

    @staticmethod
    def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")

    def _check_sources(self) -> None:
        if self.method in _NEEDS_MODEL and self.model is None:
            what = "a smaller engine or model" if self.method == "draft" else "the directory of its checkpoint"
            raise ValueError(f"method {self.method!r} needs model=, {what}")
        if self.exit_layer is not None:
            if self.method != "self":
                raise ValueError(f"method {self.method!r} has no exit_layer; leave out exit_layer={self.exit_layer!r}")
            _check_int("exit_layer", self.exit_layer, 1, MAX_EXIT_LAYER)
        if self.method not in (*_NEEDS_MODEL, "self") and self.model is not None:
            raise ValueError(f"method {self.method!r} uses no model; leave out model={self.model!r}")
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        if (self.method == "custom") != (self.proposer is not None):
            raise ValueError(
                f"method is {self.method!r} and proposer is {self.proposer!r}; a proposer goes with method='custom'"
            )


def check_tree(tree: object, depth: int) -> tuple[tuple[int, ...], ...]:
    """The paths of a token tree, sorted by depth, so that every path comes behind its parent.

    Raises ValueError where there are too many paths, or one is empty, repeated, deeper than `depth`, or lacks its parent or an
    elder sibling.
    """
    try:
        paths = [tuple(path) for path in tree]  # type: ignore[attr-defined]
    except TypeError:
        raise ValueError(f"tree is {tree!r}; allowed: paths such as ((0,), (1,), (0, 0)), or None") from None
    known = set(paths)
    if not paths or len(known) != len(paths):
        raise ValueError(f"tree is {tree!r}; allowed: at least one path, each once")
    if len(paths) > MAX_TREE_NODES:
        raise ValueError(f"tree has {len(paths)} paths; allowed: at most {MAX_TREE_NODES}")
    for path in paths:
        bad = not path or any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in path)
        if bad or len(path) > depth:
            raise ValueError(
                f"tree has the path {path!r}; allowed: 1 to num_draft_tokens={depth} choices, integers >= 0"
            )
        for needed in (path[:-1], (*path[:-1], path[-1] - 1) if path[-1] else ()):
            if needed and needed not in known:
                raise ValueError(f"tree has the path {path!r} and not {needed!r}; add that one")
    return tuple(sorted(paths, key=lambda path: (len(path), path)))


def _check_int(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; allowed: integers from {least} to {most}")
