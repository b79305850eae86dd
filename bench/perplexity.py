"""What quantization costs in quality: perplexity of one text under builds of one model that differ in precision.

python bench/perplexity.py --device cuda --output bench/results/h200-perplexity.json

The first variant is what the others are compared with. "plain": as the weights are; "kv_fp8", "kv_int8": the KV cache (with
calibration, fp8 keys lose their mean); any recipe's name: its linear layers; "NAME+kv_fp8": both. What is calibrated takes the demo
model's own text, or --calibration.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from camshaft.models import demo
from camshaft.passes.quantization.recipe import RECIPES
from camshaft.runtime.bench.environment import git_commit, machine, package_versions
from camshaft.runtime.bench.perplexity import document_tokens, perplexity

import camshaft
from camshaft import LLM

UNCALIBRATED = tuple(name for name, recipe in RECIPES.items() if not recipe.calibrated)
DEFAULT = ("plain", "kv_fp8", "fp8+kv_fp8", *UNCALIBRATED)


def options_of(variant: str) -> dict[str, Any]:
    """The options of `camshaft.compile` for a variant. Raises ValueError for an unknown one."""
    options: dict[str, Any] = {}
    for part in variant.split("+"):
        if part in ("kv_fp8", "kv_int8"):
            options["kv_cache_dtype"] = part.removeprefix("kv_")
        elif part.split(":g")[0] in RECIPES:
            options["quantize"], *sizes = part.split(":g")
            if sizes:
                options["group"] = int(sizes[0])
        elif part != "plain":
            raise ValueError(
                f"variant {variant!r} is unknown; known: plain, kv_fp8, kv_int8, {', '.join(RECIPES)} (RECIPE:g64: in "
                "groups of 64), joined by +"
            )
    return options


def measure(name: str, args: argparse.Namespace, text: str) -> dict[str, Any]:
    """Builds one variant and scores the text."""
    options = options_of(name)
    calibrated = options.get("quantize") in set(RECIPES) - set(UNCALIBRATED) or "kv_cache_dtype" in options
    if args.calibration is not None and calibrated:
        options["calibration"] = args.calibration.read_text(encoding="utf-8")
    engine = camshaft.compile(
        args.model,
        target=args.target,
        device=args.device,
        dtype=args.dtype,
        max_seq_len=args.context + 2,
        max_sequences=args.max_sequences,
        max_batch_tokens=args.max_batch_tokens,
        **options,
    )
    with LLM(engine, kv_cache_bytes=args.kv_cache_bytes) as llm:
        tokens = document_tokens(llm.tokenizer, text)[: args.max_tokens]
        start = time.perf_counter()
        score = perplexity(llm, tokens, context=args.context)
        seconds = time.perf_counter() - start
    return {
        "variant": name,
        "dtype": engine.config.dtype,
        "target": engine.config.target,
        "weights_bytes": engine.weights_bytes,
        "kv_bytes_per_block": sum(group.bytes_per_block for group in engine.cache_groups),
        "tokens": score.num_tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "seconds": round(seconds, 2),
        "report": list(engine.manifest.report),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hugging Face directory, hub id, or demo")
    parser.add_argument("--text", type=Path, default=demo.heldout_path(), help="documents, separated by form feeds")
    parser.add_argument("--variants", default=",".join(DEFAULT), help="separated by commas")
    parser.add_argument("--calibration", type=Path, help="text for recipes that need data")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--max-tokens", type=int, help="score only the first tokens")
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--max-batch-tokens", type=int, default=1024)
    parser.add_argument("--kv-cache-bytes", type=int, default=256 << 20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = args.variants.split(",")
    try:
        for name in names:
            options_of(name)
    except ValueError as error:
        parser.error(str(error))
    text = args.text.read_text(encoding="utf-8")
    results = []
    for name in names:
        results.append(measure(name, args, text))
        print(f"{name}: perplexity {results[-1]['perplexity']:.4f}", file=sys.stderr)
    base = results[0]["perplexity"]
    for result in results:
        result["ratio"] = result["perplexity"] / base
    document = {
        "kind": "camshaft-perplexity",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": sys.version.split()[0], **package_versions()},
        "machine": machine(),
        "git": git_commit(),
        "model": args.model,
        "text": args.text.name,
        "context": args.context,
        "results": results,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{'variant':20} {'perplexity':>11} {'ratio':>8} {'weights MB':>11}")
    for result in results:
        size = result["weights_bytes"] / 1e6
        print(f"{result['variant']:20} {result['perplexity']:11.4f} {result['ratio']:8.4f} {size:11.1f}")


if __name__ == "__main__":
    main()
