"""What the host does for a step, without a model: schedule, build, sample, update, deliver, over an engine that computes nothing.

    python bench/host_step.py --out host-step.json [--sequences 256,1024] [--steps 100] [--profile]

Steady steps decode one token of every sequence; mixed steps also start a new prompt for each one that ends. Times are CPU time of
the one thread that does it, in milliseconds per step. `--profile` prints where they go.
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import json
import platform
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))


class Discard:
    """A sink for results that nobody reads."""

    wants_increments = False

    def increment(self, output: Any) -> None:
        """Not called."""

    def finish(self, output: Any) -> None:
        """Drops a result."""

    def fail(self, error: Exception) -> None:
        """Raises what ended a request."""
        raise error


def make_core(num_sequences: int, asynchronous: bool, block_size: int, max_batch_tokens: int) -> Any:
    """A core over the fake engine, with blocks for all sequences."""
    from camshaft.runtime.core import ServingCore
    from camshaft.runtime.kv_cache import CacheGroup
    from camshaft.runtime.plan import SchedulerConfig
    from camshaft.runtime.scheduler import Scheduler
    from runtime.fake_engine import FakeEngine

    engine = FakeEngine(
        vocab_size=64, max_seq_len=2048, max_batch_tokens=max_batch_tokens, max_sequences=num_sequences,
        block_size=block_size, cheap=True,
    )  # fmt: skip
    config = SchedulerConfig(
        groups=(CacheGroup(num_blocks=num_sequences * 2048 // block_size, block_size=block_size),),
        max_batch_tokens=max_batch_tokens, max_sequences=num_sequences, max_seq_len=engine.max_seq_len,
    )  # fmt: skip
    options = {"asynchronous": asynchronous} if "asynchronous" in inspect.signature(ServingCore).parameters else {}
    return ServingCore(engine, Scheduler(config), None, **options)


def add(core: Any, first: int, count: int, prompt_len: int, output_len: int) -> None:
    """Queues greedy requests with random prompts."""
    from camshaft.runtime.generation import Generation
    from camshaft.runtime.inputs import CheckedInput

    from camshaft import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    prompts = torch.randint(1, 64, (count, prompt_len), generator=torch.Generator().manual_seed(first)).tolist()
    for number, prompt in enumerate(prompts, start=first):
        core.add(Generation(f"r{number}", CheckedInput(None, prompt, params), number, Discard(), frozenset()))


def timed(core: Any, steps: int, profile: cProfile.Profile | None) -> list[float]:
    """Milliseconds of each of `steps` steps."""
    times = []
    for _ in range(steps):
        if profile:
            profile.enable()
        start = time.thread_time()
        core.step()
        times.append(1e3 * (time.thread_time() - start))
        if profile:
            profile.disable()
    return times


def measure(args: argparse.Namespace, num_sequences: int, mixed: bool, asynchronous: bool) -> dict[str, Any]:
    """One case: starts all sequences, then times steps."""
    core = make_core(num_sequences, asynchronous, args.block_size, max(8192, 2 * num_sequences))
    if mixed:  # lengths are spread, so that the same number ends and starts in every step
        for index in range(args.output_len):
            count = num_sequences * (index + 1) // args.output_len - num_sequences * index // args.output_len
            add(core, 100_000 * index, count, args.prompt_len, index + 2)
        add(core, 100_000 * args.output_len, num_sequences * (args.steps // args.output_len + 2), args.prompt_len,
            args.output_len)  # fmt: skip
    else:
        add(core, 0, num_sequences, args.prompt_len, 1024)
    while core.scheduler.stats.running < num_sequences:
        core.step()
    for _ in range(5):
        core.step()
    profile = cProfile.Profile() if args.profile else None
    before = core.scheduler.stats.steps
    times = timed(core, args.steps, profile)
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return {
        "sequences": num_sequences,
        "steps": "mixed" if mixed else "decode",
        "asynchronous": asynchronous,
        "plans": core.scheduler.stats.steps - before,
        "median_ms": round(statistics.median(times), 3),
        "p90_ms": round(sorted(times)[int(0.9 * len(times))], 3),
    }


def main() -> None:
    """Runs all cases and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sequences", default="1,256,1024")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--kinds", default="decode,mixed")
    parser.add_argument("--modes", default="strict,async")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        measure(args, int(count), kind == "mixed", mode == "async")
        for count in args.sequences.split(",")
        for kind in args.kinds.split(",")
        for mode in args.modes.split(",")
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    document = {"versions": versions, "command": sys.argv, "results": results}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{'sequences':>9} {'steps':>7} {'mode':>7} {'median ms':>10} {'p90 ms':>8}")
    for result in results:
        mode = "async" if result["asynchronous"] else "strict"
        print(
            f"{result['sequences']:>9} {result['steps']:>7} {mode:>7} {result['median_ms']:>10} {result['p90_ms']:>8}"
        )


if __name__ == "__main__":
    main()
