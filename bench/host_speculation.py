"""What the host does for a step that verifies drafts, without a model: propose, schedule, build, sample, accept, observe.

    python bench/host_speculation.py --out host-speculation.json [--sequences 1,64] [--steps 200] [--profile]

Target and draft model are engines that compute nothing and agree on most tokens, so that some drafts are rejected; texts repeat,
so that prompt lookup finds drafts, too. Times are CPU time of the one thread that does it, without the engines', in milliseconds
per step. `--profile` prints where they go.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from camshaft.runtime.batch import Batch  # noqa: E402
from host_step import Discard  # noqa: E402
from runtime.fake_engine import FakeEngine  # noqa: E402

VOCAB_SIZE, PERIOD, BLOCK_SIZE, MAX_SEQ_LEN = 64, 11, 16, 4096


class PeriodicEngine(FakeEngine):
    """The token at a position follows from the position alone, but for a share `spoilt` of the rows.

    step_s: CPU seconds spent in here, which are not the host's work. device_s: seconds that a device would have taken for the steps
    that were waited for: what adaptive lengths are chosen by.
    """

    def __init__(self, num_sequences: int, spoilt: float, seed: int) -> None:
        super().__init__(
            vocab_size=VOCAB_SIZE, max_seq_len=MAX_SEQ_LEN, max_batch_tokens=max(8192, 32 * num_sequences),
            max_sequences=num_sequences, block_size=BLOCK_SIZE, cheap=True,
        )  # fmt: skip
        self.step_s = self.device_s = 0.0
        self._launched: deque[float] = deque()
        self._spoilt, self._rng = spoilt, np.random.default_rng(seed)
        noise = torch.randn(PERIOD + 1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
        noise[torch.arange(PERIOD + 1), torch.arange(3, PERIOD + 4)] += 12.0
        self._rows = noise

    def wait(self) -> None:
        """The oldest step launched has come to its end."""
        self.device_s += self._launched.popleft()

    def step(self, batch: Batch) -> torch.Tensor:
        """Logits [R, V]."""
        start = time.thread_time()
        keys = batch.positions.numpy()[batch.sample_rows.numpy()] % PERIOD
        if self._spoilt:
            keys = np.where(self._rng.random(len(keys)) < self._spoilt, PERIOD, keys)
        logits = self._rows.index_select(0, torch.from_numpy(keys))
        self._launched.append(5e-3 + 1e-5 * batch.token_ids.shape[0])
        self.step_s += time.thread_time() - start
        return logits


def make_core(num_sequences: int, method: str, adaptive: bool) -> tuple[Any, list[PeriodicEngine]]:
    """A core that speculates, and its engines."""
    from camshaft.runtime.core import ServingCore
    from camshaft.runtime.kv_cache import CacheGroup
    from camshaft.runtime.plan import SchedulerConfig
    from camshaft.runtime.scheduler import Scheduler
    from camshaft.runtime.speculative.build import make_proposer
    from camshaft.runtime.speculative.speculation import Speculation

    from camshaft import SpeculativeConfig

    model = "draft" if method == "draft" else None
    config = SpeculativeConfig(method=method, model=model, num_draft_tokens=4, adaptive=adaptive)
    engine, draft = PeriodicEngine(num_sequences, 0.2, 1), PeriodicEngine(num_sequences, 0.0, 2)
    scheduler = Scheduler(
        SchedulerConfig(
            groups=(CacheGroup(num_blocks=num_sequences * MAX_SEQ_LEN // BLOCK_SIZE, block_size=BLOCK_SIZE),),
            max_batch_tokens=engine.max_batch_tokens, max_sequences=num_sequences, max_seq_len=MAX_SEQ_LEN,
        )
    )  # fmt: skip
    core = ServingCore(engine, scheduler, None, asynchronous=True, speculative=config)
    collect = core.runner.collect

    def waited_for(step: Any) -> Any:
        engine.wait()
        return collect(step)

    core.runner.collect = waited_for  # type: ignore[method-assign]
    proposer = make_proposer(config, engine, draft)
    core.speculation = Speculation(config, proposer, scheduler, core.runner, clock=lambda: engine.device_s)
    return core, [engine, draft]


def add(core: Any, count: int, temperature: float) -> None:
    """Queues requests whose prompts have repetitions."""
    from camshaft.runtime.generation import Generation
    from camshaft.runtime.inputs import CheckedInput

    from camshaft import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=3500, ignore_eos=True, detokenize=False)
    for number in range(count):
        prompt = [3 + (position - 1) % PERIOD for position in range(100 + number % 7)]
        core.add(Generation(f"r{number}", CheckedInput(None, prompt, params), number, Discard(), frozenset()))


def measure(args: argparse.Namespace, num_sequences: int, method: str, temperature: float) -> dict[str, Any]:
    """One case: starts all sequences, then times steps."""
    core, engines = make_core(num_sequences, method, args.adaptive)
    add(core, num_sequences, temperature)
    for _ in range(args.warm_up):
        core.step()
    profile = cProfile.Profile() if args.profile else None
    totals = core.speculation.totals.copy()
    times: list[float] = []
    for _ in range(args.steps):
        before = sum(engine.step_s for engine in engines)
        if profile:
            profile.enable()
        start = time.thread_time()
        core.step()
        elapsed_s = time.thread_time() - start
        if profile:
            profile.disable()
        times.append(1e3 * (elapsed_s - sum(engine.step_s for engine in engines) + before))
    assert core.scheduler.stats.running == num_sequences, "requests ended: fewer steps"
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    found = core.speculation.totals
    return {
        "sequences": num_sequences,
        "method": method,
        "temperature": temperature,
        "adaptive": args.adaptive,
        "verifications_per_step": round((found.num_verifications - totals.num_verifications) / args.steps, 1),
        "drafts_per_step": round((sum(found.drafted) - sum(totals.drafted)) / args.steps, 1),
        "accepted_per_step": round((sum(found.accepted) - sum(totals.accepted)) / args.steps, 1),
        "p10_ms": round(sorted(times)[int(0.1 * len(times))], 3),
        "median_ms": round(statistics.median(times), 3),
        "p90_ms": round(sorted(times)[int(0.9 * len(times))], 3),
    }


def main() -> None:
    """Runs all cases and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sequences", default="1,64")
    parser.add_argument("--methods", default="ngram,draft")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=30)
    parser.add_argument("--adaptive", action="store_true", help="choose lengths by the times of an imagined device")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        measure(args, int(count), method, float(temperature))
        for count in args.sequences.split(",")
        for method in args.methods.split(",")
        for temperature in args.temperatures.split(",")
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    document = {"versions": versions, "command": sys.argv, "results": results}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"{'sequences':>9} {'method':>7} {'temp.':>6} {'drafts':>7} {'accepted':>9} "
        f"{'p10 ms':>8} {'median ms':>10} {'p90 ms':>8}"
    )
    for row in results:
        print(
            f"{row['sequences']:>9} {row['method']:>7} {row['temperature']:>6} {row['drafts_per_step']:>7} "
            f"{row['accepted_per_step']:>9} {row['p10_ms']:>8} {row['median_ms']:>10} {row['p90_ms']:>8}"
        )


if __name__ == "__main__":
    main()
