"""Self speculation of the demo model on the CPU: accepted lengths behind every layer, and of the trained exit.

    python bench/early_exit.py --out bench/results/cpu-early-exit.json [--layers 4 5 6 7 8] [--prompts 200]

1. Greedy outputs of `--prompts` held-out prompts in mixed batches against plain decoding.
2. Mean accepted length: held-out text and code that repeats itself, at 4 drafted tokens, without adaptation.
3. Output tokens per second at batch 1 as a multiple of plain decoding, in turns; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from camshaft.models import demo
from speculative import LIMITS, accepted_lengths, agreement, code, held_out, speeds

import camshaft
from camshaft import SpeculativeConfig

SELF = SpeculativeConfig(method="self", adaptive=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu-early-exit.json"))
    parser.add_argument("--layers", nargs="*", type=int, default=[4, 5, 6, 7, 8])
    parser.add_argument("--exits", nargs="*", default=[], help="directories of trained exits")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--target", default="onnxruntime")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from camshaft.runtime import Tokenizer

    tokenizer = Tokenizer.from_dir(demo.path())
    document: dict[str, Any] = {
        "command": f"python bench/early_exit.py --layers {' '.join(map(str, args.layers))} --prompts {args.prompts}"
        + (f" --exits {' '.join(args.exits)}" if args.exits else "") + f" --repeats {args.repeats} --target {args.target}",
        "versions": {"camshaft": camshaft.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(), "exits": {},
    }  # fmt: skip
    prompts = held_out(args.prompts, tokenizer, 100)
    texts = {"held-out text": held_out(8, tokenizer, 200, seed=2), "repetitive code": code(tokenizer)}
    for exit in [*args.layers, *args.exits]:
        engine = camshaft.compile("demo", target=args.target, early_exit=exit, **LIMITS)
        name = f"exit behind layer {engine.early_exit}{', trained' if engine.config.exit_head else ''}"
        entry: dict[str, Any] = {"acceptance": accepted_lengths(engine, {"self": SELF}, tokenizer)}
        if prompts:
            entry["agreement"] = agreement(engine, {"self": SELF}, prompts)
        if args.repeats:
            timed = {"plain": None, "self, 4 tokens": SELF, "self, adaptive": SpeculativeConfig(method="self")}
            entry["speed"] = speeds(engine, timed, texts, [1], args.repeats)
        document["exits"][name] = entry
        equal = entry.get("agreement", {}).get("self", {}).get("equal")
        for text, found in entry["acceptance"].items():
            print(f"{name:32} {text:44} {found['mean_accepted_length']:.2f}", flush=True)
        print(f"{name:32} greedy outputs equal to plain decoding: {equal} of {len(prompts)}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
