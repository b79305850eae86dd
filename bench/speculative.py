"""Speculative decoding of the demo model on the CPU: the same tokens, accepted lengths, and tokens per second.

    python bench/speculative.py --out bench/results/cpu-speculative.json [--prompts 200] [--repeats 3] [--peer]
        [--methods ngram draft heads eagle]

1. Greedy outputs of `--prompts` held-out prompts in mixed batches, with each method, against plain decoding.
2. Mean accepted length: held-out text, and code that repeats itself, at 4 drafted tokens, without adaptation.
3. Tokens per second at batch 1, 4 and 16: plain and every method, in turns within each repeat; medians. --peer adds Transformers'
   generate, plain and with the same draft model as its assistant, at batch 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from camshaft.models import demo

import camshaft
from camshaft import LLM, SamplingParams, SpeculativeConfig

METHODS = ["ngram", "draft", "heads", "eagle"]
LIMITS: dict[str, Any] = {"max_seq_len": 640, "max_batch_tokens": 256, "max_sequences": 16}
CODE = '''class {name}:
    """A {noun} of the inventory."""

    def __init__(self, name, size, weight):
        self.name = name
        self.size = size
        self.weight = weight

    def get_name(self):
        return self.name

    def set_name(self, name):
        self.name = name

    def get_size(self):
        return self.size

    def set_size(self, size):
        self.size = size

    def get_weight(self):
        return self.weight

'''
NOUNS = ("Box", "Crate", "Pallet", "Barrel", "Basket", "Bottle", "Carton", "Sack")


def held_out(count: int, tokenizer: Any, length: int, seed: int = 0) -> list[list[int]]:
    """Beginnings of `length` tokens, from places all over the held-out text."""
    ids = tokenizer.encode(
        demo.heldout_path().read_text(encoding="utf-8").replace("\f", "\n"), add_special_tokens=False
    )
    rng = random.Random(seed)
    return [ids[at : at + length] for at in (rng.randrange(len(ids) - length) for _ in range(count))]


def code(tokenizer: Any) -> list[list[int]]:
    """Classes that repeat each other, each prompt ending in the middle of the next."""
    prompts = []
    for first, second in zip(NOUNS, NOUNS[1:]):
        text = "".join(CODE.format(name=name, noun=name.lower()) for name in (first, second, first + second))
        prompts.append(tokenizer.encode(text[: len(text) * 5 // 6], add_special_tokens=False))
    return prompts


def run(engine: Any, config: SpeculativeConfig | None, prompts: list[list[int]], params: Any) -> dict[str, Any]:
    """Outputs, seconds and counts of one run, everything at once."""
    with LLM(engine, speculative=config, kv_cache_bytes=1 << 28) as llm:
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, progress=False)
        return {"tokens": [o.token_ids for o in outputs], "seconds": time.perf_counter() - start, "stats": llm.stats()}


TREE = (
    (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0, 0),
)  # fmt: skip
"""A token tree for EAGLE, whose paths are choices by rank."""

Engines = dict[str, Any]
"""Engines of methods that need one of their own, by name; all others run on the plain engine."""


def agreement(
    engine: Any, configs: dict[str, SpeculativeConfig], prompts: list[list[int]], engines: Engines | None = None
) -> dict[str, Any]:
    """Greedy outputs of prompts of all lengths, equal to plain decoding or not."""
    rng = random.Random(1)
    prompts = [prompt[: rng.randrange(4, 100)] for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(8, 64), ignore_eos=True) for _ in prompts]
    plain = run(engine, None, prompts, params)["tokens"]
    found: dict[str, Any] = {"prompts": len(prompts)}
    for name, config in configs.items():
        result = run((engines or {}).get(name, engine), config, prompts, params)
        found[name] = {
            "equal": sum(a == b for a, b in zip(plain, result["tokens"])),
            "mean_accepted_length": result["stats"].speculative.mean_accepted_length,
        }
    return found


def accepted_lengths(
    engine: Any, configs: dict[str, SpeculativeConfig], tokenizer: Any, engines: Engines | None = None
) -> dict[str, Any]:
    """Mean accepted length and acceptance by position, greedy and sampled."""
    texts = {"held-out text": held_out(48, tokenizer, 200), "repetitive code": code(tokenizer)}
    found: dict[str, Any] = {}
    for text, prompts in texts.items():
        for temperature in (0.0, 0.7):
            for name, config in configs.items():
                params = SamplingParams(temperature=temperature, max_tokens=96, seed=1, ignore_eos=True)
                one = (engines or {}).get(name, engine)
                metrics = run(one, config, prompts, params)["stats"].speculative
                found[f"{text}, temperature {temperature}, {name}"] = {
                    "mean_accepted_length": metrics.mean_accepted_length,
                    "acceptance_per_position": metrics.acceptance_per_position,
                    "tokens_per_step": metrics.tokens_per_step,
                }
    return found


def speeds(
    engine: Any,
    configs: dict[str, SpeculativeConfig | None],
    texts: dict[str, list[list[int]]],
    batches: list[int],
    repeats: int,
    engines: Engines | None = None,
) -> list[dict[str, Any]]:
    """Output tokens per second, methods in turns within each repeat, each after a first run of other prompts."""
    rows = []
    for text, prompts in texts.items():
        for batch in batches:
            times: dict[str, list[float]] = {name: [] for name in configs}
            for _ in range(repeats):
                for name, config in configs.items():
                    one = (engines or {}).get(name, engine)
                    with LLM(one, speculative=config, kv_cache_bytes=1 << 28, enable_prefix_cache=False) as llm:
                        _generate(llm, prompts[-batch:], batch)
                        times[name].append(_generate(llm, prompts[: max(batch, 4)], batch))
            plain = statistics.median(times["plain"])
            for name, values in times.items():
                median = statistics.median(values)
                rows.append({"text": text, "batch": batch, "method": name, "tok_s": median, "speed_up": median / plain,
                             "all": values})  # fmt: skip
                print(
                    f"{text:16} batch {batch:3}  {name:28} {median:8.1f} tokens/s  {median / plain:5.2f} x", flush=True
                )
    return rows


def _generate(llm: LLM, prompts: list[list[int]], batch: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, detokenize=False)
    start, count = time.perf_counter(), 0
    for begin in range(0, len(prompts), batch):
        outputs = llm.generate(prompts[begin : begin + batch], params, progress=False)
        count += sum(len(output.token_ids) for output in outputs)
    return count / (time.perf_counter() - start)


def transformers_peer(prompts: list[list[int]]) -> dict[str, float]:
    """Output tokens per second of Transformers' generate, one prompt at a time, plain and with an assistant model."""
    import transformers

    transformers.logging.set_verbosity_error()
    load: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    model, draft = (load(path, dtype=torch.float32) for path in (demo.path(), demo.draft_path()))
    found = {}
    for name, options in {"plain": {}, "assisted": {"assistant_model": draft}}.items():
        count, start = 0, 0.0
        for number, prompt in enumerate(prompts[:5]):
            if number == 1:
                start = time.perf_counter()
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=96,
                                     min_new_tokens=96, pad_token_id=0, **options)  # fmt: skip
            count += (out.shape[1] - len(prompt)) if number else 0
        found[name] = count / (time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu-speculative.json"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16], help="none: no speeds")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = camshaft.compile("demo", target=args.target, **LIMITS)
    draft = camshaft.compile(str(demo.draft_path()), target=args.target, **LIMITS)
    hidden = camshaft.compile("demo", target=args.target, hidden_layers=(2, 5, 8, -1), **LIMITS)
    from camshaft.runtime import Tokenizer

    tokenizer = Tokenizer.from_dir(demo.path())
    fixed = {
        "ngram": SpeculativeConfig(method="ngram", adaptive=False),
        "draft": SpeculativeConfig(method="draft", model=draft, adaptive=False),
        "heads": SpeculativeConfig(method="heads", model=str(demo.heads_path()), adaptive=False),
        "eagle": SpeculativeConfig(method="eagle", model=str(demo.eagle_path()), adaptive=False),
    }
    timed: dict[str, SpeculativeConfig | None] = {
        "plain": None,
        "ngram, adaptive": SpeculativeConfig(method="ngram"),
        "draft, adaptive": SpeculativeConfig(method="draft", model=draft),
        "eagle, adaptive": SpeculativeConfig(method="eagle", model=str(demo.eagle_path())),
        **{f"{name}, 4 tokens": config for name, config in fixed.items()},
        "ngram, 8 tokens": SpeculativeConfig(method="ngram", num_draft_tokens=8, adaptive=False),
    }
    fixed = {name: config for name, config in fixed.items() if name in args.methods}
    timed = {name: config for name, config in timed.items() if name.split(",")[0] in ("plain", *args.methods)}
    eagle = partial(SpeculativeConfig, method="eagle", model=str(demo.eagle_path()), adaptive=False)
    longer = {f"eagle, {count} tokens": eagle(num_draft_tokens=count) for count in (6, 8)}
    longer[f"eagle, tree of {len(TREE)}"] = eagle(num_draft_tokens=5, tree=TREE)
    lengths = fixed | (longer if "eagle" in args.methods else {})
    engines = {name: hidden for name in (*lengths, *timed) if name.startswith(("heads", "eagle"))}
    prompts = held_out(args.prompts, tokenizer, 100)
    document: dict[str, Any] = {
        "command": f"python bench/speculative.py --prompts {args.prompts} --repeats {args.repeats} --threads {args.threads}"
        f" --target {args.target} --batches {' '.join(map(str, args.batches))}" + " --peer" * args.peer
        + ("" if args.methods == METHODS else f" --methods {' '.join(args.methods)}"),
        "versions": {"camshaft": camshaft.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(), "native_step": engine.native_step,
    }  # fmt: skip
    document["agreement"] = agreement(engine, fixed, prompts, engines)
    print(json.dumps(document["agreement"], indent=1), flush=True)
    document["acceptance"] = accepted_lengths(engine, lengths, tokenizer, engines)
    for name, entry in document["acceptance"].items():
        print(f"{name:50} {entry['mean_accepted_length']:.2f}", flush=True)
    texts = {"held-out text": held_out(16, tokenizer, 200, seed=2), "repetitive code": code(tokenizer) * 3}
    document["speed"] = speeds(engine, timed, texts, args.batches, args.repeats, engines)
    if args.peer:
        document["transformers"] = transformers_peer(texts["held-out text"])
        print(json.dumps({"transformers": document["transformers"]}), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
