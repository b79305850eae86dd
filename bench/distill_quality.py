"""What quantization costs with weights that were distilled for it: perplexity of the held-out text, against the model as it is.

python bench/distill_quality.py --variants nvfp4 --steps 1000 --batch-tokens 16384 --sampled-tokens 2097152 --out nvfp4.json

A variant is a recipe's name or the text of a format ("int4:g64:zp/none"; "int4:g64": inputs as they are), with "+kv_fp8" for an
fp8 KV cache, or "+kv_fp8c" for one whose keys lose their mean, which the build finds on the calibration text, and with
"+down_proj=nvfp4/fp8" for another format of the layers in whose names that is. Each is scored three
times by the code of bench/perplexity.py: the model as it is ("plain"), its plain weights rounded ("rounded"), the distilled ones
rounded ("distilled"). The students learn from the demo model's calibration text and from what the model writes, and are
chosen by a part of that text; the held-out text is read for the scores alone. A variant that fails is recorded, and others go on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import re
import shlex
import sys
import tempfile
import time
import traceback
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from camshaft.export.distillation.settings import DistillationSettings
from camshaft.graph.linear_format import LinearFormat
from camshaft.models import demo
from camshaft.passes.quantization.recipe import RECIPES, Recipe
from camshaft.runtime.bench.environment import git_commit, machine, package_versions
from camshaft.runtime.bench.perplexity import Perplexity, document_tokens, perplexity

import camshaft
from camshaft import LLM

DEFAULT = ("nvfp4", "int4:g64", "int4:g64:zp", "int4", "int4:g128:zp", "w4a8", "fp8+kv_fp8", "fp8+kv_fp8c")


def options_of(variant: str) -> dict[str, Any]:
    """The options of `camshaft.distill` for a variant. Raises ValueError for an unknown one."""
    name, *more = variant.split("+")
    recipe: Recipe | None = None
    if name in RECIPES:
        recipe = RECIPES[name]
    elif name != "plain":
        recipe = Recipe(format=LinearFormat.parse(name if "/" in name else f"{name}/none"))
    options: dict[str, Any] = {}
    for part in more:
        layers, _, format = part.partition("=")
        if format and recipe is not None:
            other = Recipe(format=LinearFormat.parse(format))
            recipe = replace(recipe, overrides=(*recipe.overrides, (f"*{layers}*", other)))
        elif part in ("kv_fp8", "kv_fp8c"):
            options |= {"kv_cache_dtype": "fp8", "center_keys": part == "kv_fp8c"}
        else:
            raise ValueError(f"variant {variant!r}: {part!r} is unknown; known: kv_fp8, kv_fp8c, LAYERS=FORMAT")
    if recipe is not None:
        options["quantize"] = recipe
    return options


def score(model: Any, args: argparse.Namespace, options: dict[str, Any]) -> tuple[Perplexity, float]:
    """The held-out text's perplexity under a build of a model, and the seconds of both."""
    start = time.perf_counter()
    options = dict(options)
    if options.pop("center_keys", False):
        options["calibration"] = demo.calibration_path()
    engine = camshaft.compile(
        model,
        target="eager",
        device=args.device,
        dtype=args.score_dtype,
        max_seq_len=args.context + 2,
        max_sequences=16,
        max_batch_tokens=4096 if args.device == "cuda" else 1024,
        cache=False,
        **options,
    )
    with LLM(engine, kv_cache_bytes=256 << 20) as llm:
        tokens = document_tokens(llm.tokenizer, demo.heldout_path().read_text(encoding="utf-8"))[: args.tokens]
        found = perplexity(llm, tokens, context=args.context)
    return found, time.perf_counter() - start


def measure(variant: str, args: argparse.Namespace, settings: dict[str, Any], plain: Perplexity) -> dict[str, Any]:
    """Distils one variant and scores it before and after."""
    options = options_of(variant)
    rounded, rounded_s = score("demo", args, options)
    with tempfile.TemporaryDirectory(prefix="camshaft-distilled-") as scratch:
        output = Path(scratch) / "model" if args.keep is None else args.keep / re.sub(r"\W", "_", variant)
        start = time.perf_counter()
        found = camshaft.distill("demo", output, device=args.device, progress=args.progress, **options, **settings)
        distill_s = time.perf_counter() - start
        distilled, distilled_s = score(str(output), args, options)
        facts = json.loads((output / "distillation.json").read_text(encoding="utf-8"))
    return {
        "variant": variant,
        "tokens": distilled.num_tokens,
        "perplexity": {
            "plain": plain.perplexity, "rounded": rounded.perplexity, "distilled": distilled.perplexity,
        },
        "increase_percent": {
            "rounded": round(100 * (rounded.perplexity / plain.perplexity - 1), 3),
            "distilled": round(100 * (distilled.perplexity / plain.perplexity - 1), 3),
        },
        "divergence": {"before": found.divergence_before, "after": found.divergence},
        "best_step": found.best_step,
        "captured": facts["outcome"]["captured"],
        "train_tokens": found.train_tokens,
        "seconds": {
            "distill": round(distill_s, 1), "train": round(found.seconds, 1),
            "score_rounded": round(rounded_s, 1), "score_distilled": round(distilled_s, 1),
        },
        "settings": facts["settings"],
        "history": facts["outcome"]["history"],
        "report": list(found.report),
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and those that are settings of the distillation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(DEFAULT), help="separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, help="score only the first tokens of the held-out text")
    parser.add_argument(
        "--score-context", dest="context", type=int, default=512, help="tokens of a window of the scores"
    )
    parser.add_argument("--score-dtype", default="float32", help="of the builds that are scored")
    parser.add_argument("--keep", type=Path, help="keep the distilled checkpoints in this directory")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    group = parser.add_argument_group("settings of the distillation")
    for field in fields(DistillationSettings):
        name = "--" + field.name.replace("_", "-")
        group.add_argument(name if field.name != "context" else "--train-context", dest=f"set_{field.name}",
                           type=type(field.default), help=f"default: {field.default}")  # fmt: skip
    args = parser.parse_args(argv)
    settings = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
    try:
        DistillationSettings.of(**settings)
        for variant in args.variants.split(","):
            options_of(variant)
    except ValueError as error:
        parser.error(str(error))
    return args, settings


def main() -> None:
    """Command line."""
    args, settings = parse()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("camshaft.export.distillation").setLevel(logging.INFO)
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    plain, _ = score("demo", args, {})
    results: list[dict[str, Any]] = []
    for variant in args.variants.split(","):
        try:
            results.append(measure(variant, args, settings, plain))
            increase = results[-1]["increase_percent"]
            print(
                f"{variant}: {increase['rounded']:+.2f}% -> {increase['distilled']:+.2f}%", file=sys.stderr, flush=True
            )
        except (ValueError, RuntimeError, OSError) as error:
            traceback.print_exc()
            results.append({"variant": variant, "error": f"{type(error).__name__}: {error}"})
        document = {
            "kind": "camshaft-distill-quality",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "versions": {"python": sys.version.split()[0], **package_versions()},
            "machine": machine(),
            "git": git_commit(),
            "text": demo.heldout_path().name,
            "context": args.context,
            "results": results,
        }
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(
        f"{'variant':18} {'plain':>9} {'rounded':>9} {'':>8} {'distilled':>9} {'':>8} {'KL before':>10} {'after':>7} {'step':>5} "
        f"{'train s':>8}"
    )
    for result in results:
        if "error" in result:
            print(f"{result['variant']:18} {result['error']}")
            continue
        found, increase, kl = result["perplexity"], result["increase_percent"], result["divergence"]
        print(
            f"{result['variant']:18} {found['plain']:9.4f} {found['rounded']:9.4f} {increase['rounded']:+7.2f}% "
            f"{found['distilled']:9.4f} {increase['distilled']:+7.2f}% {kl['before']:10.4f} {kl['after']:7.4f} "
            f"{result['best_step']:5d} {result['seconds']['train']:8.1f}"
        )


if __name__ == "__main__":
    main()
