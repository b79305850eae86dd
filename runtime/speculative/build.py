"""From a `SpeculativeConfig` to a proposer: the draft model is opened and checked against the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ...graph.weights import Weight
from ..batch import Engine
from ..tokenizer import Tokenizer
from .config import SpeculativeConfig
from .draft_model import DraftModelProposer, full_group
from .draft_tree import TreeDraftProposer
from .early_exit import EarlyExitProposer, check_exit, exit_option
from .ngram import NgramProposer
from .proposer import Proposer, ProposerContext


def _heads(context: ProposerContext) -> Proposer:
    from .heads import HeadsProposer  # these read checkpoints with camshaft.models, which plain serving does not import

    return HeadsProposer(context)


def _eagle(context: ProposerContext) -> Proposer:
    from .eagle import EagleProposer

    return EagleProposer(context)


def _eagle_tree(context: ProposerContext) -> Proposer:
    from .eagle_tree import TreeEagleProposer

    return TreeEagleProposer(context)


_PROPOSERS: dict[str, Callable[[ProposerContext], Proposer]] = {
    "ngram": NgramProposer,
    "draft": DraftModelProposer,
    "heads": _heads,
    "eagle": _eagle,
    "self": EarlyExitProposer,
}
"""Proposers that come with the package, by method."""
_TREE_PROPOSERS: dict[str, Callable[[ProposerContext], Proposer]] = {
    "draft": TreeDraftProposer,
    "heads": _heads,
    "eagle": _eagle_tree,
}
"""As above, of those that draft trees."""
_SAME_LIMITS = ("max_seq_len", "max_sequences", "max_batch_tokens", "block_size")
"""Build options that a draft model which is compiled for an LLM takes from the target."""


def make_proposer(config: SpeculativeConfig, engine: Engine, draft_engine: Engine | None) -> Proposer:
    """The proposer of a config; `draft_engine` has its KV cache bound. Raises ValueError for what it cannot draft, or not from this
    engine."""
    context = ProposerContext(config=config, engine=engine, draft_engine=draft_engine)
    if config.proposer is not None:
        return config.proposer(context)
    if config.tree is not None and config.method in _PROPOSERS.keys() - _TREE_PROPOSERS.keys():
        raise ValueError(f"method {config.method!r} drafts chains and tree is {config.tree!r}; leave out the tree")
    return (_PROPOSERS if config.tree is None else _TREE_PROPOSERS)[config.method](context)


def check_config(config: SpeculativeConfig, engine: Engine) -> None:
    """Raises ValueError where drafts cannot fit the target's steps or sequences."""
    if config.method == "self":
        check_exit(config, engine)
    needed = engine.max_sequences + config.num_draft_tokens
    if engine.max_batch_tokens < needed:
        raise ValueError(
            f"num_draft_tokens is {config.num_draft_tokens} and the engine's steps have at most "
            f"{engine.max_batch_tokens} tokens, {engine.max_sequences} of them for the requests themselves; allowed: at "
            f"most {max(0, engine.max_batch_tokens - engine.max_sequences)}; draft fewer, or build with a larger "
            "max_batch_tokens or a smaller max_sequences"
        )
    if config.num_draft_tokens >= engine.max_seq_len - 1:
        raise ValueError(
            f"num_draft_tokens is {config.num_draft_tokens} and max_seq_len is {engine.max_seq_len}; draft fewer"
        )


def target_options(config: SpeculativeConfig, model: Any) -> dict[str, Any]:
    """Options of `camshaft.compile` with which `model`, which is not compiled yet, becomes a target for a config.

    Raises ValueError for a config that lacks one.
    """
    if config.method == "self":
        return {"early_exit": exit_option(config)}
    if config.method == "heads":
        from .heads import HEAD_INPUT

        return {"hidden_layers": (HEAD_INPUT,)}
    if config.method != "eagle":
        return {}
    from ...models.speculative.eagle import capture_layers, named_layers, read_eagle_config

    draft = read_eagle_config(Path(str(config.model)))
    return {"hidden_layers": named_layers(draft) or capture_layers(draft, _num_layers(model))}


def _num_layers(model: Any) -> int:
    """Decoder layers of a model that is not compiled yet, by its config."""
    from transformers import AutoConfig

    from ...models import demo

    config: Any = getattr(model, "config", None)
    if config is None:
        config = AutoConfig.from_pretrained(demo.path() if model == "demo" else model)
    return int(config.get_text_config().num_hidden_layers)


def open_draft_engine(config: SpeculativeConfig, engine: Engine) -> Engine | None:
    """The engine of method draft or eagle, compiled like the target where it is not an engine; None for other methods.

    Raises ValueError where it does not go with the target.
    """
    if config.method not in ("draft", "eagle"):
        return None
    full_group(engine)
    model: Any = config.model
    if config.method == "eagle":
        draft = _open_eagle(Path(str(model)), engine)
    elif hasattr(model, "step") and hasattr(model, "bind_cache"):
        draft = cast(Engine, model)
    elif isinstance(model, str) and (Path(model) / "manifest.json").is_file():
        from ...export import load_engine

        draft = cast(Engine, load_engine(Path(model)))
    else:
        draft = _compile_like(engine, model)
    check_draft_engine(draft, engine)
    if config.method == "draft":
        check_vocabulary(draft, engine)
    if config.tree is not None:
        _check_trees(len(config.tree), draft, engine)
    return draft


def write_steps(config: SpeculativeConfig, engine: Any, draft: Any) -> None:
    """Prepares the native steps that one request's drafts need, of engines on the CPU that have such: they are no part of the first
    texts' time then. KV caches are bound. draft: the engine of a draft model, or None."""
    most = 1 + (config.num_draft_tokens if config.tree is None else len(config.tree))
    if hasattr(engine, "write_native_steps"):
        engine.write_native_steps([(count, count) for count in range(1, most + 1)])
    if hasattr(draft, "write_native_steps"):
        caught_up = most if config.method == "eagle" else 2  # its layer computes what was accepted again
        draft.write_native_steps([(count, 1) for count in range(1, caught_up + 1)])


def _compile_like(engine: Engine, model: Any, **options: Any) -> Engine:
    """A model compiled with a target's limits, target, device and dtype."""
    import camshaft

    build = getattr(engine, "config", None)
    options |= {name: getattr(engine, name) for name in _SAME_LIMITS}
    if build is not None:
        options |= {"target": build.target, "device": build.device, "dtype": build.dtype}
    return cast(Engine, camshaft.compile(model, **options))


def _open_eagle(directory: Path, engine: Any) -> Engine:
    """EAGLE's layer, compiled; its hidden state 1 is what the next row reads."""
    from ...models.speculative.eagle_model import EagleModel

    model = EagleModel.read(directory, embeddings_of(engine), engine.manifest.model.name)
    return _compile_like(engine, model, hidden_layers=(1,))


def embeddings_of(engine: Any) -> Weight:
    """The token embeddings [V, H] of an engine. Raises ValueError for one whose plan looks none up."""
    for step in engine.plan.steps:
        segment = engine.plan.segments.get(getattr(step, "segment", None))
        if segment is None:
            continue
        names = [entry["name"] for entry in segment.placeholders][segment.num_inputs :]
        for entry in segment.nodes:
            if entry["op"] == "call_function" and entry["target"] == "aten.embedding.default":
                table = entry["args"][0]
                found: Weight = engine.weights[step.weights[names.index(table["node"])]]
                return found
    raise ValueError(
        f"{engine.manifest.model.name} looks up no token embeddings, which the EAGLE checkpoint lacks; give one with embed_tokens"
    )


def _check_trees(num_nodes: int, draft: Engine, engine: Engine) -> None:
    """Raises ValueError where a draft model and its target cannot compute trees of so many nodes."""
    for name, one in (("draft model", draft), ("target", engine)):
        if not getattr(one, "takes_tree_masks", False):
            raise ValueError(f"tree is given and the {name}'s attention takes no tree masks; leave out the tree")
        if one.max_batch_tokens <= num_nodes:
            raise ValueError(
                f"tree has {num_nodes} nodes and the {name}'s steps at most {one.max_batch_tokens} tokens; allowed: at most "
                f"{one.max_batch_tokens - 1} nodes"
            )


def check_draft_engine(draft: Engine, engine: Engine) -> None:
    """Raises ValueError where a draft model cannot draft for a target."""
    if draft is engine:
        raise ValueError("the draft model is the target's own engine; give a smaller model (or use method 'ngram')")
    if draft.device != engine.device:
        raise ValueError(f"the draft model is on {draft.device} and the target on {engine.device}; build both for one")
    if draft.block_size != engine.block_size:
        raise ValueError(
            f"the draft model has blocks of {draft.block_size} tokens and the target of {engine.block_size}; they share "
            "blocks, so build both with one block_size"
        )
    for name in ("max_seq_len", "max_sequences"):
        if getattr(draft, name) < getattr(engine, name):
            raise ValueError(
                f"the draft model was built for {name}={getattr(draft, name)} and the target for {getattr(engine, name)}; "
                f"build it with at least the target's {name}"
            )


def check_vocabulary(draft: Engine, engine: Engine) -> None:
    """The same token must mean the same text. Without tokenizers all that can be compared is the number of tokens."""
    if draft.tokenizer_path is None or engine.tokenizer_path is None:
        if draft.vocab_size != engine.vocab_size:
            raise ValueError(
                f"the draft model has a vocabulary of {draft.vocab_size} tokens and the target of {engine.vocab_size}; a draft "
                "model needs the target's tokenizer"
            )
        return
    if Path(draft.tokenizer_path) == Path(engine.tokenizer_path):
        return
    mine, theirs = (
        Tokenizer.from_dir(path).backend.get_vocab() for path in (draft.tokenizer_path, engine.tokenizer_path)
    )
    if mine == theirs:
        return
    differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    example = differing[0]
    raise ValueError(
        f"the draft model's tokenizer differs from the target's in {len(differing)} tokens ({example!r} is "
        f"{mine.get(example)} there and {theirs.get(example)} here); a draft model needs the target's tokenizer"
    )
