"""What an LLM is made from: an engine, and the tokenizer that came with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch

from .batch import Engine
from .speculative.build import target_options
from .speculative.config import SpeculativeConfig
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def engine_of(
    model: Engine | str | Path | torch.nn.Module, compile_kwargs: dict[str, Any], speculative: SpeculativeConfig | None
) -> Engine:
    """The engine that `model` is, names, or is compiled to, then with what `speculative` needs.

    Raises ValueError for what is no model, and for `compile_kwargs` where nothing is compiled.
    """
    saved = isinstance(model, (str, Path)) and (Path(model) / "manifest.json").is_file()
    is_engine = not isinstance(model, (str, Path, torch.nn.Module))
    if is_engine and not (hasattr(model, "step") and hasattr(model, "bind_cache")):
        raise ValueError(
            f"model is a {type(model).__name__}; allowed: an engine, the directory of a saved engine, a Hugging Face "
            "directory or id, or an nn.Module"
        )
    if compile_kwargs and (saved or is_engine):
        raise ValueError(
            f"{', '.join(sorted(compile_kwargs))}: these are options of camshaft.compile, and the model is compiled "
            "already; leave them out, or pass the original model"
        )
    if is_engine:
        return cast(Engine, model)
    if saved:
        from ..export import load_engine

        return cast(Engine, load_engine(Path(cast(str, model))))
    import camshaft

    options = {} if speculative is None else target_options(speculative, model)
    return cast(Engine, camshaft.compile(model, **{**options, **compile_kwargs}))


def tokenizer_of(engine: Engine) -> Tokenizer | None:
    """The tokenizer that came with an engine; None, with a warning where it is of a kind that is not read, if none did."""
    path = engine.tokenizer_path
    if path is None:
        return None
    if not (Path(path) / "tokenizer.json").is_file():
        logger.warning("no tokenizer.json in %s: prompts must be token ids, and outputs have no text", path)
        return None
    return Tokenizer.from_dir(path)
