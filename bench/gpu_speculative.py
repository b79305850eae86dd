"""Speculative decoding on a GPU: the same tokens first, then the speed of the Llama-3.1-8B shape with acceptance replayed.

    python3 bench/gpu_speculative.py --out OUT [--precisions bf16 fp8] [--batches 1 4 16 64] [--acceptance 0.8] [--drafts 5]

Weights are random, so no draft model agrees with them and acceptance is replayed: the target verifies every draft as always, and
which drafts count as accepted is then drawn with probability `--acceptance` each, given those before it. Where drafts come from:

    free       random tokens made on the host: drafting costs nothing but the wait for each step's result
    one layer  a draft engine of one layer of the same width and vocabulary, whose steps take their time

Each is measured with a fixed draft length and with adaptive lengths, against plain decoding in the same process. Every variant that
fails is recorded, and the others go on. `--budget-s` bounds the whole. Writes OUT/gpu-speculative.json; the table comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_STEPS_BEFORE_PROFILE = 30
"""Of a run: its prompts, and the search for lengths."""
PRECISIONS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"quantize": "fp8", "kv_cache_dtype": "fp8"}}


class FreeDrafts:
    """Random drafts of the wanted lengths, at no cost."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, context: Any) -> None:
        self._rng, self._vocab_size = random.Random(0), context.engine.vocab_size

    def add(self, request: Any, state: Any) -> None:
        pass

    def release(self, request_id: str) -> None:
        pass

    def observe(self, verified: Sequence[Any]) -> None:
        pass

    def propose(self, targets: Sequence[Any]) -> Any:
        from camshaft.runtime.speculative import Drafts

        tokens = [[self._rng.randrange(self._vocab_size) for _ in range(target.num_drafts)] for target in targets]
        return Drafts([len(drafts) for drafts in tokens], tokens)


def replay_acceptance(llm: Any, rate: float, seed: int = 0) -> None:
    """Makes an LLM accept each draft with probability `rate` given those before it, whatever its logits say.

    The tokens that the sampler chose are replaced by the drafts, or by another token, after all of its work is done.
    """
    from camshaft.runtime.packing import upload

    sampler, rng = llm._core.runner.sampler, np.random.default_rng(seed)
    launch = sampler.launch

    def replayed(logits: Any, states: Any, num_outputs: Any, drafted: Any = None) -> Any:
        pending = launch(logits, states, num_outputs, drafted)
        if drafted is None:
            return pending
        children = np.flatnonzero(drafted.parents_R >= 0)
        accepted = (rng.random(len(children)) < rate).astype(np.int64)
        rows, parents, yes = upload(np.stack([children, drafted.parents_R[children], accepted]), pending.tokens.device)
        drafts = drafted.at_R.index_select(0, rows)
        other = (drafts + 1) % llm.engine.vocab_size
        pending.tokens.index_copy_(0, parents, torch.where(yes > 0, drafts, other))
        return pending

    sampler.launch = replayed


# ------------------------------------------------------------------------------------------------------------ numerics
def agreement(target: str) -> dict[str, Any]:
    """Greedy tokens of a small fp32 model with n-grams, and with itself as the draft model, against plain decoding."""
    from families import random_model, tiny_config

    import camshaft
    from camshaft import LLM, SamplingParams, SpeculativeConfig

    def engine() -> Any:
        return camshaft.compile(
            random_model(tiny_config("llama")), target=target, device=DEVICE, dtype=torch.float32, max_seq_len=128,
            max_batch_tokens=96, max_sequences=8, block_size=16,
        )  # fmt: skip

    model, draft = engine(), engine()
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 128) for _ in range(rng.randrange(1, 30))] * rng.randrange(1, 3) for _ in range(40)]
    params = [
        SamplingParams(
            temperature=0.8 * (i % 4 == 3), seed=i, max_tokens=rng.randrange(8, 48), ignore_eos=True,
            repetition_penalty=1.2 if i % 5 == 1 else 1.0, logprobs=1 if i % 6 == 2 else None,
            bad_token_ids=[[5, 6]] if i % 7 == 3 else None,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    configs = {
        "ngram": SpeculativeConfig(method="ngram", ngram_min=1, adaptive=False, acceptance="exact"),
        "draft": SpeculativeConfig(method="draft", model=draft, adaptive=False, acceptance="exact"),
        "draft, adaptive": SpeculativeConfig(method="draft", model=draft, acceptance="exact"),
        "draft, rejection": SpeculativeConfig(method="draft", model=draft, adaptive=False),
    }
    entry: dict[str, Any] = {"requests": len(prompts)}
    with LLM(model, memory_fraction=0.2) as llm:
        plain = [o.token_ids for o in llm.generate(prompts, params, progress=False)]
    for name, config in configs.items():
        with LLM(model, memory_fraction=0.2, speculative=config) as llm:
            for _ in range(3):  # launched, captured, replayed
                tokens = [o.token_ids for o in llm.generate(prompts, params, progress=False)]
            metrics = llm.stats().speculative
        differ = [i for i, (a, b) in enumerate(zip(plain, tokens)) if a != b]
        entry[name] = {
            "differ": len(differ), "greedy_differ": sum(params[i].temperature == 0 for i in differ),
            "acceptance_per_position": metrics.acceptance_per_position,
        }  # fmt: skip
        print(f"agreement, {name}: {entry[name]}", flush=True)
    return entry


# --------------------------------------------------------------------------------------------------------------- speed
class FullBatch:
    """Counts the tokens of steps in which all of `batch` requests decode.

    Drafts are accepted by chance, so requests of equal length end one after another: the last steps of a run have few sequences.
    """

    def __init__(self, llm: Any, batch: int) -> None:
        self._batch, self._scheduler = batch, llm._core.scheduler
        self._update = self._scheduler.update
        self._since: float | None = None
        self.seconds, self.tokens, self.steps = 0.0, 0, 0

    def __enter__(self) -> FullBatch:
        self._scheduler.update = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduler.update = self._update

    def _counted(self, plan: Any, sampled: Any) -> Any:
        updates = self._update(plan, sampled)
        now = time.perf_counter()
        verifies = all(row.num_tokens == 1 + row.num_draft_tokens for row in plan.others)
        full = plan.num_sequences == self._batch and verifies
        if full and self._since is not None:
            self.seconds += now - self._since
            self.tokens += len(sampled) if isinstance(sampled, np.ndarray) else sum(map(len, sampled))
            self.steps += 1
        self._since = now if full else None
        return updates


def compile_shape(layers: int | None, precision: str, target: str, sequences: int) -> Any:
    """An engine of the Llama-3.1-8B shape with random weights, of so many layers."""
    from camshaft.models.random_weights import RandomWeights

    import camshaft

    shape = RandomWeights.of("llama-3.1-8b", seed=0, device=DEVICE)
    if layers is not None:
        shape.config.num_hidden_layers = layers
    return camshaft.compile(
        shape, target=target, device=DEVICE, dtype=torch.bfloat16, max_seq_len=1024, max_batch_tokens=2048,
        max_sequences=sequences, **PRECISIONS[precision],
    )  # fmt: skip


def measure(llm: Any, batch: int, length: int, repeats: int, warmups: int) -> dict[str, Any]:
    """Decoded tokens per second from the moment that all requests have their first token, and the host's time per step.

    `tok_s` is that until the last request ends, `full_tok_s` that while none has ended.

    warmups: runs that do not count, in which graphs are captured and costs are learnt; without repeats there is no result.
    """
    from camshaft import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    rng = random.Random(batch)
    speeds, full_speeds, accepted = [], [], 0.0
    for repeat in range(warmups + repeats):
        prompts = [[rng.randrange(3, llm.engine.vocab_size) for _ in range(128)] for _ in range(batch)]
        before = llm.stats().times
        with FullBatch(llm, batch) as full:
            outputs = llm.generate(prompts, params, progress=False)
        times = llm.stats().times
        begin = max(o.metrics.first_token_s for o in outputs)
        end = max(o.metrics.finished_s for o in outputs)
        if repeat >= warmups:
            speeds.append(batch * (length - 1) / (end - begin))
            full_speeds.append(full.tokens / full.seconds)
            counts = [o.metrics.speculative for o in outputs if o.metrics.speculative is not None]
            accepted = sum(c.num_tokens for c in counts) / max(
                1, sum(c.num_tokens - c.num_verified_tokens + c.num_verifications for c in counts)
            )
    if not speeds:
        return {}
    steps = times.steps - before.steps
    names = ("propose_s", "schedule_s", "launch_s", "wait_s", "deliver_s")
    parts = {name[:-2] + "_ms": 1e3 * (getattr(times, name) - getattr(before, name)) / steps for name in names}
    return {
        "tok_s": float(np.median(speeds)), "all": speeds, "full_tok_s": float(np.median(full_speeds)), "full_all": full_speeds,
        "full_steps": full.steps, "tokens_per_step_of_a_request": accepted, "steps": steps,
        "step_ms": 1e3 * batch * (length - 1) / float(np.median(speeds)) / steps, "ahead": times.ahead - before.ahead, **parts,
    }  # fmt: skip


@contextlib.contextmanager
def opened(args: argparse.Namespace, engine: Any, config: Any) -> Iterator[Any]:
    """An LLM that replays acceptance where it speculates, and counts its steps."""
    from camshaft.runtime.bench.recording import RecordingEngine

    from camshaft import LLM

    options: dict[str, Any] = {"memory_fraction": args.memory_fraction, "enable_prefix_cache": False}
    try:
        with LLM(RecordingEngine(engine), speculative=config, **options) as llm:
            if config is not None:
                replay_acceptance(llm, args.acceptance)
            yield llm
    finally:  # a variant that fails leaves the memory to the next one
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def profile(llm: Any, batch: int, length: int, steps: int) -> dict[str, Any]:
    """What the device does in `steps` steps in the middle of one more run, those of a draft model between them included."""
    from camshaft.runtime.bench.profile import StepProfiler

    from camshaft import SamplingParams

    recording = llm.engine
    recording.clear()
    recording.on_step = profiler = StepProfiler(_STEPS_BEFORE_PROFILE, steps, device=DEVICE)
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    rng = random.Random(batch)
    prompts = [[rng.randrange(3, recording.vocab_size) for _ in range(128)] for _ in range(batch)]
    try:
        llm.generate(prompts, params, progress=False)
    finally:
        recording.on_step = None
    return profiler.result()


def variants(args: argparse.Namespace, one_layer: Any) -> dict[str, Any]:
    """Name -> SpeculativeConfig, None for plain decoding."""
    from camshaft import SpeculativeConfig

    free: dict[str, Any] = {"method": "custom", "proposer": FreeDrafts, "num_draft_tokens": args.drafts}
    layer: dict[str, Any] = {"method": "draft", "model": one_layer, "num_draft_tokens": args.drafts}
    found = {
        "plain": None,
        "free, fixed": SpeculativeConfig(**free, adaptive=False),
        "free, adaptive": SpeculativeConfig(**free),
    }
    if one_layer is not None:
        found["one layer, fixed"] = SpeculativeConfig(**layer, adaptive=False)
        found["one layer, adaptive"] = SpeculativeConfig(**layer)
    return found


def speed(args: argparse.Namespace, precision: str, deadline: float) -> list[dict[str, Any]]:
    """All variants of one precision."""
    rows: list[dict[str, Any]] = []
    engine = compile_shape(args.layers, precision, args.target, max(args.batches))
    one_layer = None if args.skip_one_layer else compile_shape(1, precision, args.target, max(args.batches))
    plain: dict[int, dict[str, Any]] = {}
    for name, config in variants(args, one_layer).items():
        if config is not None and args.variants is not None and name not in args.variants:
            continue
        if time.monotonic() > deadline:
            rows.append({"precision": precision, "variant": name, "error": "no time left"})
            continue
        try:
            with opened(args, engine, config) as llm:
                for batch in args.batches:
                    row = {"precision": precision, "variant": name, "batch": batch}
                    row |= measure(llm, batch, args.length, args.repeats, args.warmups)
                    if config is None:
                        plain[batch] = row
                    for speed in ("tok_s", "full_tok_s"):
                        ratio = row[speed] / plain[batch][speed] if batch in plain else None
                        row[speed.replace("tok_s", "speed_up")] = ratio
                    if config is not None:
                        costs = llm._core.speculation.lengths.costs.table()
                        row["costs_ms"] = {
                            f"{depth} deep, {t} tokens": 1e3 * s for (depth, t), s in sorted(costs.items())
                        }
                        row["balance"] = llm._core.speculation.lengths.account.balance
                    rows.append(row)
                    print(f"{precision} {name} batch {batch}: {row['tok_s']:.1f} tokens/s", flush=True)
        except Exception as error:
            rows.append({"precision": precision, "variant": name, "error": f"{type(error).__name__}: {error}"})
            traceback.print_exc()
    # a profiler may slow what comes after it
    for name, config in variants(args, one_layer).items() if args.profile_steps else ():
        measured = [row for row in rows if row["variant"] == name and "error" not in row]
        if not measured or time.monotonic() > deadline:
            continue
        with opened(args, engine, config) as llm:
            for row in measured:
                measure(llm, row["batch"], args.length, 0, args.warmups)
                row["profile"] = profile(llm, row["batch"], args.length, args.profile_steps)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'':6}{'variant':22}{'batch':>6}{'tokens/s':>11}{'speed-up':>10}{'full batch':>12}"
        f"{'tokens/step':>13}{'step ms':>9}{'wait ms':>9}"
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['precision']:6}{row['variant']:22} {row['error'][:90]}")
            continue
        lines.append(
            f"{row['precision']:6}{row['variant']:22}{row['batch']:6}{row['tok_s']:11.1f}{row['speed_up'] or 0:10.2f}"
            f"{row['full_speed_up'] or 0:12.2f}{row['tokens_per_step_of_a_request']:13.2f}"
            f"{row['step_ms']:9.2f}{row['wait_ms']:9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="inductor")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--length", type=int, default=256, help="tokens of each output")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--profile-steps", type=int, default=0, help="steps of a profile of each variant and batch")
    parser.add_argument("--variants", nargs="+", default=None, help="names; plain decoding is always measured")
    parser.add_argument("--layers", type=int, default=None, help="fewer than the shape's 32, for a trial")
    parser.add_argument("--memory-fraction", type=float, default=0.8)
    parser.add_argument("--budget-s", type=float, default=540)
    parser.add_argument("--skip-one-layer", action="store_true")
    parser.add_argument("--skip-agreement", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget_s
    import camshaft

    document: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv), "acceptance": args.acceptance, "drafts": args.drafts,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": {"camshaft": camshaft.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "speed": [],
    }  # fmt: skip

    def save() -> None:
        (args.out / "gpu-speculative.json").write_text(json.dumps(document, indent=1) + "\n")

    if not args.skip_agreement:
        try:
            document["agreement"] = agreement(args.target)
        except Exception as error:
            document["agreement"] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        save()
    for precision in args.precisions:
        try:
            document["speed"] += speed(args, precision, deadline)
        except Exception as error:
            document["speed"].append(
                {"precision": precision, "variant": "", "error": f"{type(error).__name__}: {error}"}
            )
            traceback.print_exc()
        save()
    print(table(document["speed"]))


if __name__ == "__main__":
    main()
