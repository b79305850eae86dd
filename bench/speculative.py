"""Speculative decoding of the demo model on the CPU: the same tokens, accepted lengths, and tokens per second.

    python bench/speculative.py --out bench/results/cpu-speculative.json [--prompts 200] [--repeats 3] [--peer]
        [--methods ngram draft heads eagle]

1. Greedy outputs of `--prompts` held-out prompts in mixed batches, with each method, against plain decoding.
2. Mean accepted length: held-out text, and code that repeats itself, at 4 drafted tokens, without adaptation.
3. Tokens per second at batch 1, 4 and 16: plain and every method in turns, a batch of prompts at a time; medians. --peer adds
   Transformers' generate, plain and with the same draft model as its assistant, at batch 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


class Timed(NamedTuple):
    """What a part of a run has taken."""

    tokens: int
    seconds: float
    decoded: int
    """Tokens behind the first of each request."""
    decode_s: float
    """From when all requests have their first token to the end of the last."""

    def __add__(self, other: tuple[Any, ...]) -> Timed:
        return Timed(*map(sum, zip(self, other)))


def speeds(
    compiled: Callable[[str], Any],
    configs: dict[str, SpeculativeConfig | None],
    texts: dict[str, list[list[int]]],
    batches: list[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """Output tokens per second, prompts included (`tok_s`) and of decoding alone (`decode_tok_s`), as medians of `repeats` runs.

    Each method has an engine and an LLM of its own, `compiled` for its name, and one batch of prompts goes to all of them in turn
    before the next: what else the machine does meanwhile meets all alike. Speed-ups are medians of those to plain decoding in the
    same run.
    """
    rows = []
    with ExitStack() as stack:
        llms = {
            name: stack.enter_context(
                LLM(compiled(name), speculative=config, kv_cache_bytes=1 << 27, enable_prefix_cache=False)
            )
            for name, config in configs.items()
        }
        for text, prompts in texts.items():
            for batch in batches:
                runs: dict[str, list[Timed]] = {name: [] for name in llms}
                for llm in llms.values():
                    _generate(llm, prompts[-batch:])
                for _ in range(repeats):
                    parts: dict[str, list[Timed]] = {name: [] for name in llms}
                    for begin in range(0, max(batch, 4), batch):
                        for name, llm in llms.items():
                            parts[name].append(_generate(llm, prompts[begin : begin + batch]))
                    for name, timed in parts.items():
                        runs[name].append(sum(timed, Timed(0, 0.0, 0, 0.0)))
                rows += [_row(text, batch, name, runs[name], runs["plain"]) for name in llms]
                for row in rows[-len(llms) :]:
                    print(
                        f"{text:16} batch {batch:3}  {row['method']:20} {row['tok_s']:8.1f} tokens/s  {row['speed_up']:5.2f} x"
                        f"   decoding {row['decode_tok_s']:8.1f}  {row['decode_speed_up']:5.2f} x", flush=True,
                    )  # fmt: skip
    return rows


def _row(text: str, batch: int, name: str, runs: list[Timed], plain: list[Timed]) -> dict[str, Any]:
    """Medians and all runs of one method."""
    row: dict[str, Any] = {"text": text, "batch": batch, "method": name}
    kinds = {"": lambda one: one.tokens / one.seconds, "decode_": lambda one: one.decoded / one.decode_s}
    for kind, speed in kinds.items():
        values = [speed(one) for one in runs]
        ratios = [value / speed(base) for value, base in zip(values, plain)]
        row[f"{kind}tok_s"], row[f"{kind}speed_up"] = statistics.median(values), statistics.median(ratios)
        row[f"{kind}all"], row[f"{kind}speed_ups"] = values, ratios
    return row


def _generate(llm: LLM, prompts: list[list[int]]) -> Timed:
    params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    seconds, tokens = time.perf_counter() - start, sum(len(output.token_ids) for output in outputs)
    decode_s = max(o.metrics.finished_s for o in outputs) - max(o.metrics.first_token_s for o in outputs)
    return Timed(tokens, seconds, tokens - len(outputs), decode_s)


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
    parser.add_argument("--speeds-only", action="store_true", help="without the same tokens and the accepted lengths")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def compiled(name: str) -> Any:
        """An engine for a method: heads and EAGLE read hidden states."""
        states = {"hidden_layers": (2, 5, 8, -1)} if name.startswith(("heads", "eagle")) else {}
        return camshaft.compile("demo", target=args.target, **states, **LIMITS)

    engine, hidden = compiled("plain"), compiled("eagle")
    draft = camshaft.compile(str(demo.draft_path()), target=args.target, **LIMITS)
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
        "draft, adaptive": SpeculativeConfig(method="draft", model=str(demo.draft_path())),
        "eagle, adaptive": SpeculativeConfig(method="eagle", model=str(demo.eagle_path())),
        **{f"{name}, 4 tokens": config for name, config in fixed.items() if name != "draft"},
        "draft, 4 tokens": SpeculativeConfig(method="draft", model=str(demo.draft_path()), adaptive=False),
        **{f"ngram, {n} tokens": SpeculativeConfig(method="ngram", num_draft_tokens=n, adaptive=False) for n in (6, 8)},
    }
    fixed = {name: config for name, config in fixed.items() if name in args.methods}
    timed = {name: config for name, config in timed.items() if name.split(",")[0] in ("plain", *args.methods)}
    eagle = partial(SpeculativeConfig, method="eagle", model=str(demo.eagle_path()), adaptive=False)
    longer = {f"eagle, {count} tokens": eagle(num_draft_tokens=count) for count in (6, 8)}
    longer[f"eagle, tree of {len(TREE)}"] = eagle(num_draft_tokens=5, tree=TREE)
    lengths = fixed | (longer if "eagle" in args.methods else {})
    engines = {name: hidden for name in lengths if name.startswith(("heads", "eagle"))}
    prompts = held_out(args.prompts, tokenizer, 100)
    document: dict[str, Any] = {
        "command": f"python bench/speculative.py --prompts {args.prompts} --repeats {args.repeats} --threads {args.threads}"
        f" --target {args.target} --batches {' '.join(map(str, args.batches))}"
        + " --peer" * args.peer + " --speeds-only" * args.speeds_only
        + ("" if args.methods == METHODS else f" --methods {' '.join(args.methods)}"),
        "versions": {"camshaft": camshaft.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(), "native_step": engine.native_step,
    }  # fmt: skip
    if not args.speeds_only:
        document["agreement"] = agreement(engine, fixed, prompts, engines)
        print(json.dumps(document["agreement"], indent=1), flush=True)
        document["acceptance"] = accepted_lengths(engine, lengths, tokenizer, engines)
        for name, entry in document["acceptance"].items():
            print(f"{name:50} {entry['mean_accepted_length']:.2f}", flush=True)
    texts = {"held-out text": held_out(16, tokenizer, 200, seed=2), "repetitive code": code(tokenizer) * 3}
    document["speed"] = speeds(compiled, timed, texts, args.batches, args.repeats)
    if args.peer:
        document["transformers"] = transformers_peer(texts["held-out text"])
        print(json.dumps({"transformers": document["transformers"]}), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
