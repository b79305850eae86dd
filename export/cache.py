"""The build cache: lowered programs by what they were built from. No weights are in it, so an entry is small.

$CAMSHAFT_CACHE or ~/.cache/camshaft
  builds/KEY/manifest.json  plan.json  recipes.json  constants.safetensors  engines/...
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..graph.weights import Weight, from_recipes
from .artifact import _stored_weights, atomic_directory, write_safetensors
from .engine import Engine
from .manifest import Manifest
from .segment import Plan

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """The directory of all caches: $CAMSHAFT_CACHE, or ~/.cache/camshaft."""
    return Path(os.environ.get("CAMSHAFT_CACHE", "") or Path.home() / ".cache" / "camshaft")


def build_key(facts: Mapping[str, Any]) -> str:
    """A key that differs whenever any of the facts differs."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def source_fingerprint() -> str:
    """Hash of Camshaft's own source: another version of the compiler does not reuse old builds."""
    digest = hashlib.sha256()
    export = Path(__file__).resolve().parent
    for folder in ("graph", "passes", "models", "export"):
        for file in sorted((export.parent / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def store(key: str, manifest: Manifest, plan: Plan, weights: Mapping[str, Weight], engines: Path) -> Path:
    """Adds a build to the cache and returns its directory (an existing entry wins)."""
    entry = cache_root() / "builds" / key
    if (entry / "manifest.json").is_file():
        return entry
    shutil.rmtree(entry, ignore_errors=True)  # the rest of one that was not removed whole
    with atomic_directory(entry, overwrite=False) as work:
        (work / "plan.json").write_text(json.dumps(plan.to_json(), separators=(",", ":")))
        recipes = {name: weights[name].recipe for name in plan.weight_names}
        (work / "recipes.json").write_text(json.dumps(recipes))
        constants = {name: weights[name] for name, recipe in recipes.items() if recipe is None}
        write_safetensors(work / "constants.safetensors", constants)
        shutil.copytree(engines, work / "engines")
        (work / "manifest.json").write_text(manifest.to_json())
    return entry


def find(key: str, sources: Mapping[str, Weight], tokenizer: Path | None) -> Engine | None:
    """The engine of a cached build with these weights, or None where there is no (readable) entry."""
    entry = cache_root() / "builds" / key
    if not (entry / "manifest.json").is_file():
        return None
    try:
        manifest = Manifest.from_json((entry / "manifest.json").read_text(), entry / "manifest.json")
        plan = Plan.from_json(json.loads((entry / "plan.json").read_text()))
        recipes = json.loads((entry / "recipes.json").read_text())
        missing = [file for file in manifest.engine_files if not (entry / "engines" / file).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        constants = [name for name, recipe in recipes.items() if recipe is None]
        fixed = _stored_weights(entry, replace(manifest, weights=dict.fromkeys(constants, "constants.safetensors")))
    except (ValueError, KeyError, OSError) as error:
        logger.warning("build cache entry %s is damaged (%s) and is made again", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    remade = from_recipes({name: recipe for name, recipe in recipes.items() if recipe is not None}, sources)
    return Engine(manifest, plan, {**fixed, **remade}, entry / "engines", tokenizer)


def weight_digest(weights: Mapping[str, Weight]) -> str:
    """Hash of the values of all weights, which are read one after the other."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(_bytes(weights[name].load()))
    return digest.hexdigest()[:16]


def constant_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Hash of computed buffers, which the config alone does not determine for a model in memory."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(_bytes(weights[name]))
    return digest.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
