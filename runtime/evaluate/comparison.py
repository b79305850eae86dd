"""Recipes of one model beside each other: quality, size and speed of each build, one at a time.

    reference   built, kept                 text: scored                tasks, speed
    recipe      built, saved to measure     text: against reference     tasks, speed        closed
    ...

The reference is the first variant, the model as its weights are. It stays on the device, since divergences need its logits beside
those of each recipe: memory is both engines' weights and the logits of a step.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tasks import Task, run_task

if TYPE_CHECKING:
    from ...export.engine import Engine
    from ...passes.quantization.recipe import Recipe

PLAIN = "none"
"""The variant whose linear layers are as the weights are."""
DEFAULT = (PLAIN, "fp8", "int8", "int4")
_KV = re.compile(r"kv_(\w+)")

Build = Callable[[Mapping[str, Any]], "Engine"]
"""Makes an engine of a variant's options of `camshaft.compile`."""
Tell = Callable[[str], None]
"""Takes a line about what is going on."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A build that is evaluated."""

    name: str
    options: Mapping[str, Any]
    """Of `camshaft.compile`: quantize, group, calibration, kv_cache_dtype, as far as they are given."""


def parse_variants(
    names: Sequence[str],
    *,
    group: int | None = None,
    calibration: str | Path | None = None,
    has_calibration: bool = False,
) -> list[Variant]:
    """Variants by name: "none", a recipe's name, or its JSON file; "+kv_fp8" behind one: keys and values in that dtype.

    group and calibration go to the recipes that have groups along K, or need data; has_calibration: the model brings a text of
    its own. "none" is put first, as the reference.

    Raises ValueError for unknown names, files that are no recipes, a name given twice, and recipes that need data and have none.
    """
    ordered = [PLAIN, *(name for name in names if name != PLAIN)]
    if len(set(ordered)) < len(ordered) or list(names).count(PLAIN) > 1:
        raise ValueError(f"recipes are {', '.join(names)}; each may be given once")
    variants = [_variant(name, group, calibration) for name in ordered]
    if calibration is None and not has_calibration:
        for variant in variants:
            recipe = _recipe(variant.options.get("quantize"))
            if recipe is not None and recipe.calibrated:
                raise ValueError(
                    f"recipe {variant.name} needs calibration data; give a text of the kind that the model will see"
                )
    return variants


def _recipe(quantize: str | Recipe | None) -> Recipe | None:
    from ...passes.quantization.recipe import RECIPES

    return RECIPES[quantize] if isinstance(quantize, str) else quantize


def _variant(name: str, group: int | None, calibration: str | Path | None) -> Variant:
    from ...export.manifest import CACHE_DTYPES

    base, *parts = name.split("+")
    known = [dtype for dtype in CACHE_DTYPES if dtype != "auto"]
    options: dict[str, Any] = {}
    for part in parts:
        match = _KV.fullmatch(part)
        dtype = match.group(1) if match else None
        if dtype not in known or "kv_cache_dtype" in options:
            allowed = ", ".join(f"+kv_{dtype}" for dtype in known)
            raise ValueError(f"recipe {name!r} ends in +{part}; allowed behind a recipe: one of {allowed}")
        options["kv_cache_dtype"] = dtype
    if base != PLAIN:
        options |= _recipe_options(base, group, calibration)
    if calibration is not None and "kv_cache_dtype" in options:
        options["calibration"] = calibration
    return Variant(name=name, options=options)


def _recipe_options(name: str, group: int | None, calibration: str | Path | None) -> dict[str, Any]:
    from ...passes.quantization.recipe import RECIPES, Recipe

    if name.endswith(".json"):
        try:
            recipe = Recipe.from_json(json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"recipe file {name} cannot be read: {error}") from error
    elif name in RECIPES:
        recipe = RECIPES[name]
    else:
        raise ValueError(f"recipe {name!r} is unknown; known: {PLAIN}, {', '.join(RECIPES)}, or a recipe's JSON file")
    options: dict[str, Any] = {"quantize": recipe if name.endswith(".json") else name}
    if group is not None and recipe.format is not None and recipe.format.group > 0 and not recipe.format.block:
        options["group"] = group
    if calibration is not None and recipe.calibrated:
        options["calibration"] = calibration
    return options


@dataclass(frozen=True, kw_only=True)
class SpeedTest:
    """A short benchmark: greedy decoding of random prompts, one request at a time and then many at once."""

    input_len: int = 128
    """Tokens of a prompt."""
    output_len: int = 64
    """Tokens generated for it."""
    batch: int = 16
    """Requests at once."""
    repeats: int = 3
    """Timed runs; the median counts."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What is measured of each variant."""

    text: str | None = None
    """Documents, separated by form feeds: perplexity and, beside the reference, divergence."""
    context: int = 512
    """Tokens of a window of the text."""
    max_tokens: int | None = None
    """Tokens of the text that are used, from its beginning; None: all."""
    tasks: tuple[Task, ...] = ()
    speed: SpeedTest | None = None
    artifact: bool = True
    """Whether each engine is saved, to know its size on disk."""

    def __post_init__(self) -> None:
        if self.text is not None and not self.text.strip():
            raise ValueError("the text is empty; give a text of more tokens than the context")
        if self.max_tokens is not None and self.max_tokens <= self.context:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and context {self.context}; allowed: more than the context"
            )


class Comparison:
    """Evaluates variants one after another; `close` (or the end of a `with`) lets the reference go.

    Args:
        build: makes engines; each is let go before the next one is made, except the first.
        measurements: of each variant.
        keep: directory that the engines are saved in, by variant; None: a temporary one, if at all.
        tell: told of each part as it begins.
    """

    def __init__(
        self, build: Build, measurements: Measurements, *, keep: Path | None = None, tell: Tell | None = None
    ) -> None:
        self._build = build
        self._measurements = measurements
        self._keep = keep
        self._tell = tell or (lambda line: None)
        self._reference: Any = None
        self._tokens: list[int] | None = None
        self.model: dict[str, Any] = {}
        """Facts of the reference: name, architecture, number of parameters, dtype, target, device."""

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the reference go."""
        self._reference = None
        _collect_memory()

    def run(self, variant: Variant) -> dict[str, Any]:
        """A variant's entry of the document; the first variant becomes the reference.

        Raises ValueError for a text or task that does not fit the engine, before anything is measured.
        """
        measured = self._measurements
        self._tell(f"{variant.name}: building")
        start = time.perf_counter()
        engine = self._build(variant.options)
        build_s = time.perf_counter() - start
        if self._reference is None:
            self.model = _model_facts(engine)
            self._tokens = self._text_tokens(engine)
        entry: dict[str, Any] = {"recipe": variant.name, "options": _plain(variant.options), **_build_facts(engine)}
        entry |= {"build_s": round(build_s, 3), "artifact_bytes": self._artifact_bytes(variant, engine)}
        if self._tokens is not None:
            self._tell(f"{variant.name}: text of {len(self._tokens)} tokens")
            entry |= self._text(engine, self._tokens)
        if measured.tasks:
            entry["tasks"] = self._tasks(variant, engine, measured.tasks)
        if measured.speed is not None:
            self._tell(f"{variant.name}: speed")
            entry["speed"] = measure_speed(engine, measured.speed)
        if self._reference is None:
            self._reference = engine
        del engine
        _collect_memory()
        return entry

    def _text_tokens(self, engine: Any) -> list[int] | None:
        from ..bench.perplexity import document_tokens
        from ..tokenizer import Tokenizer
        from .teacher_forcing import check_text

        measured = self._measurements
        if measured.text is None:
            return None
        if engine.tokenizer_path is None:
            raise ValueError("a text needs a tokenizer and this engine has none")
        tokens = document_tokens(Tokenizer.from_dir(engine.tokenizer_path), measured.text)[: measured.max_tokens]
        check_text(tokens, measured.context, engine)
        return tokens

    def _text(self, engine: Any, tokens: Sequence[int]) -> dict[str, Any]:
        """{"text": score} and, where there is a reference, {"divergence": ...}."""
        from .divergence import compare_engines, score_text

        context = self._measurements.context
        if self._reference is None:
            return {"text": score_text(engine, tokens, context=context).to_json()}
        found = compare_engines(self._reference, engine, tokens, context=context)
        return {"text": found.score.to_json(), "divergence": found.divergence.to_json()}

    def _tasks(self, variant: Variant, engine: Any, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        from ..llm import LLM

        results = []
        with LLM(engine, cuda_graphs=False) as llm:  # prompts alone: nothing decodes
            for task in tasks:
                self._tell(f"{variant.name}: task {task.name}, {len(task.items)} items")
                results.append(run_task(llm, task).to_json())
        return results

    def _artifact_bytes(self, variant: Variant, engine: Engine) -> int | None:
        """Bytes of the saved engine's files; None where it is not to be saved."""
        if self._keep is not None:
            return directory_bytes(engine.save(self._keep / Path(variant.name).name))
        if not self._measurements.artifact:
            return None
        with tempfile.TemporaryDirectory(prefix="camshaft-eval-") as directory:
            return directory_bytes(engine.save(Path(directory) / "engine"))


def measure_speed(engine: Engine, test: SpeedTest) -> dict[str, Any]:
    """{"batch_1_tok_s": decoding alone, "batch": N, "batch_tok_s": N requests at once, prompts included}, medians.

    Raises ValueError for lengths or a batch that the engine does not take.
    """
    from ..bench.cases import Case
    from ..bench.session import Session
    from ..bench.workload import Workload

    lengths = Workload(
        num_requests=1, input_len=(test.input_len, test.input_len), output_len=(test.output_len, test.output_len)
    )
    one = Case(name="alone", mode="latency", repeats=test.repeats, workload=lengths)
    many = Case(name="batch", repeats=test.repeats, workload=dataclasses.replace(lengths, num_requests=test.batch))
    with Session(engine) as session:
        alone, batch = (session.measure(case)[0]["summary"] for case in (one, many))
    return {
        "batch_1_tok_s": alone["decode_tok_s"]["median"],
        "batch": test.batch,
        "batch_tok_s": batch["output_tok_s"]["median"],
        "input_len": test.input_len,
        "output_len": test.output_len,
        "repeats": test.repeats,
    }


def directory_bytes(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _model_facts(engine: Engine) -> dict[str, Any]:
    facts, build = engine.manifest.model, engine.config
    return {
        "name": facts.name,
        "architecture": facts.architecture,
        "num_parameters": facts.num_parameters,
        "dtype": build.dtype,
        "device": build.device,
    }


def _build_facts(engine: Engine) -> dict[str, Any]:
    build = engine.config
    return {
        "target": build.target,
        "dtype": build.dtype,
        "quantize": build.quantize,
        "kv_cache_dtype": build.kv_cache_dtype,
        "weights_bytes": engine.weights_bytes,
        "kv_bytes_per_token": sum(group.bytes_per_block for group in engine.cache_groups) / engine.block_size,
        "report": list(engine.manifest.report),
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's options as plain data; of calibration only that it was given."""
    plain = {name: value for name, value in options.items() if name != "calibration"}
    if hasattr(plain.get("quantize"), "to_json"):
        plain["quantize"] = plain["quantize"].to_json()
    return {**plain, "calibration": "calibration" in options}


def _collect_memory() -> None:
    """Gives the memory of engines that were let go back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
