"""Self speculation on a GPU: the same tokens first, then the speed of the Llama-3.1-8B shape with acceptance replayed.

    python3 bench/gpu_early_exit.py --out OUT [--exits 4 8 16] [--batches 1 4 16 64] [--acceptance 0.8] [--drafts 5]

1. The demo model in float32: greedy tokens of held-out prompts with an exit behind layer 8 against plain decoding.
2. The 8B shape with random weights: every exit drafts as it would, the target verifies, and which drafts count as accepted is drawn
   with probability `--acceptance` each (see gpu_speculative.py). Fixed and adaptive lengths, against plain decoding in the same
   process.

Every variant that fails is recorded, and the others go on. `--budget-s` bounds the whole. Writes OUT/gpu-early-exit.json; the table
comes last.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_speculative import DEVICE, PRECISIONS, measure, replay_acceptance, table


def agreement(target: str) -> dict[str, Any]:
    """Requests whose greedy tokens are those of plain decoding, and graphs that were captured or failed."""
    from camshaft.models import demo

    import camshaft
    from camshaft import LLM, SamplingParams, SpeculativeConfig

    torch.backends.cuda.matmul.allow_tf32 = False
    engine = camshaft.compile(
        "demo", target=target, device=DEVICE, dtype="float32", early_exit=8, hidden_layers=(2, 9, -1), max_seq_len=768,
        max_batch_tokens=512, max_sequences=16,
    )  # fmt: skip
    documents = demo.heldout_path().read_text(encoding="utf-8").split("\f")
    prompts = [document[: 100 + 20 * number] for number, document in enumerate(documents[:32])]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM(engine, kv_cache_bytes=1 << 28) as llm:
        plain = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
    with LLM(engine, kv_cache_bytes=1 << 28, speculative=SpeculativeConfig(method="self", adaptive=False)) as llm:
        for _ in range(3):  # launched, captured, replayed
            found = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
        counts = llm.stats().speculative
        split: Any = engine._split
        graphs = [part.execution._graphs for part in split._parts]
        return {
            "requests": len(prompts), "equal": sum(a == b for a, b in zip(plain, found)),
            "mean_accepted_length": counts.mean_accepted_length,
            "captured": [len(one.shapes) if one is not None else None for one in graphs],
            "failures": [[str(reason) for reason in one.failures.values()] if one is not None else None for one in graphs],
        }  # fmt: skip


def speed(args: argparse.Namespace, exit: int | None, plain: dict[int, float], deadline: float) -> list[dict[str, Any]]:
    """Fixed and adaptive lengths of one exit, or plain decoding, for every batch."""
    from camshaft.models.random_weights import RandomWeights

    import camshaft
    from camshaft import LLM, SpeculativeConfig

    shape = RandomWeights.of("llama-3.1-8b", seed=0, device=DEVICE)
    if args.layers is not None:
        shape.config.num_hidden_layers = args.layers
    engine = camshaft.compile(
        shape, target=args.target, device=DEVICE, dtype=torch.bfloat16, max_seq_len=1024, max_batch_tokens=2048,
        max_sequences=max(args.batches), early_exit=exit, **PRECISIONS[args.precision],
    )  # fmt: skip
    configs: dict[str, SpeculativeConfig | None] = {"plain": None}
    if exit is not None:
        configs = {
            f"exit {exit}, {name}": SpeculativeConfig(method="self", num_draft_tokens=args.drafts, adaptive=adaptive)
            for name, adaptive in (("fixed", False), ("adaptive", True))
        }
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        if time.monotonic() > deadline:
            rows.append({"precision": args.precision, "variant": name, "error": "no time left"})
            continue
        with LLM(engine, memory_fraction=args.memory_fraction, speculative=config, enable_prefix_cache=False) as llm:
            if config is not None:
                replay_acceptance(llm, args.acceptance)
            for batch in args.batches:
                row: dict[str, Any] = {"precision": args.precision, "variant": name, "batch": batch}
                row |= measure(llm, batch, args.length, args.repeats)
                if config is None:
                    plain[batch] = row["tok_s"]
                row["speed_up"] = row["tok_s"] / plain[batch] if batch in plain else None
                rows.append(row)
                print(f"{name} batch {batch}: {row['tok_s']:.1f} tokens/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="inductor")
    parser.add_argument("--precision", default="bf16", choices=list(PRECISIONS))
    parser.add_argument("--exits", nargs="*", type=int, default=[4, 8, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--length", type=int, default=256, help="tokens of each output")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=None, help="fewer than the shape's 32, for a trial")
    parser.add_argument("--memory-fraction", type=float, default=0.8)
    parser.add_argument("--budget-s", type=float, default=540)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget_s
    document: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv), "acceptance": args.acceptance, "drafts": args.drafts,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "speed": [],
    }  # fmt: skip

    def save() -> None:
        (args.out / "gpu-early-exit.json").write_text(json.dumps(document, indent=1) + "\n")

    try:
        document["agreement"] = agreement(args.target)
    except Exception as error:
        document["agreement"] = {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    print(json.dumps({"agreement": document["agreement"]}), flush=True)
    save()
    plain: dict[int, float] = {}
    for exit in (None, *args.exits):
        try:
            document["speed"] += speed(args, exit, plain, deadline)
        except Exception as error:
            name = "plain" if exit is None else f"exit {exit}"
            document["speed"].append(
                {"precision": args.precision, "variant": name, "error": f"{type(error).__name__}: {error}"}
            )
            traceback.print_exc()
        save()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    print(table(document["speed"]))


if __name__ == "__main__":
    main()
