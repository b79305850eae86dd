"""What is checked and measured of the core on a GPU: small families against eager, then a Llama-3.1-8B-shaped random model.

    python3 bench/gpu_core.py --out OUT [--families llama,gemma2] [--layers 32] [--skip-large]

Writes OUT/gpu-core.json with versions and every number. `--small` shrinks the large model, to try the script on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager_tokens(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the first logits of Transformers' eager model."""
    ids = torch.tensor([prompt], device=DEVICE)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        first = out.logits[0, -1].float()
        tokens = [int(first.argmax())]
        for _ in range(count - 1):
            ids = torch.tensor([[tokens[-1]]], device=DEVICE)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    return tokens, first


def family(name: str, target: str, dtype: torch.dtype) -> dict[str, Any]:
    """Greedy agreement of one family's small config with eager, in a batch of mixed lengths with preemption."""
    from families import random_model, tiny_config

    import camshaft
    from camshaft import SamplingParams

    model = random_model(tiny_config(name)).to(DEVICE, dtype)
    start = time.perf_counter()
    engine = camshaft.compile(
        model, target=target, dtype=dtype, max_seq_len=128, max_batch_tokens=64, max_sequences=8, block_size=16
    )
    seconds = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 5, 17, 30, 45, 60, 12, 33)]
    cache = sum(group.bytes_per_block for group in engine.cache_groups) * 14
    with camshaft.LLM(engine, kv_cache_bytes=cache, policy="max_utilization") as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0))
        preemptions = llm.stats().scheduler.preemptions
    equal = total = 0
    for prompt, output in zip(prompts, outputs):
        tokens, _ = eager_tokens(model, prompt, 24)
        equal += sum(a == b for a, b in zip(tokens, output.token_ids))
        total += 24
    segments = len(engine.plan.segments)
    return {
        "build_s": seconds,
        "phases": engine.manifest.timings,
        "segments": segments,
        "agreement": equal / total,
        "preemptions": preemptions,
    }


class Results:
    """The JSON file: sections are added as they end, an error becomes the section's content."""

    def __init__(self, path: Path) -> None:
        import transformers

        self.path = path
        self.data: dict[str, Any] = {
            "command": "python3 " + " ".join(sys.argv),
            "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def section(self, name: str, function: Callable[[dict[str, Any]], None]) -> None:
        """Runs `function`, which fills the section's dict."""
        entry = self.data[name] = {}
        start = time.perf_counter()
        try:
            function(entry)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
            entry["trace"] = traceback.format_exc()[-2500:]
        entry["section_s"] = round(time.perf_counter() - start, 2)
        shown = {key: value for key, value in entry.items() if key not in ("trace", "profile", "ledger")}
        print(name, json.dumps(shown), flush=True)
        for key in ("ledger", "profile", "trace"):
            if key in entry:
                print(entry[key], flush=True)
        self.write()

    def write(self) -> None:
        """Writes what is there so far."""
        self.path.write_text(json.dumps(self.data, indent=1))


def run_families(results: Results, names: list[str], targets: list[str], processes: int) -> None:
    """Every family with targets eager and inductor, in as many processes as given (compiling is the host's work)."""
    if processes > 1:

        def one(part: list[str]) -> dict[str, Any]:
            out = results.path.parent / f"part-{part[0]}"
            out.mkdir(exist_ok=True)
            command = [sys.executable, __file__, "--out", out, "--families", ",".join(part), "--skip-large"]
            code = subprocess.run([*command, "--targets", ",".join(targets), "--processes", "1"]).returncode
            file = out / "gpu-core.json"
            if code:
                return {f"families {','.join(part)}": {"error": f"the process ended with {code}"}}
            data = json.loads(file.read_text())
            file.unlink()
            out.rmdir()
            return data

        parts = [names[i::processes] for i in range(min(processes, len(names)))]
        with ThreadPoolExecutor(processes) as pool:
            for data in pool.map(one, parts):
                results.data.update({key: value for key, value in data.items() if key not in results.data})
        results.write()
        return
    for name in names:
        for target in targets:
            results.section(
                f"{name} {target} fp32",
                lambda entry, n=name, t=target: entry.update(family(n, t, torch.float32)),  # type: ignore[misc]
            )


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", default="llama,mistral,gemma2,gemma3,gpt_oss,bloom,falcon,mixtral,qwen3,gpt2")
    parser.add_argument("--targets", default="eager,inductor", help="the large model is built for the last one")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ["CAMSHAFT_CACHE"] = "/tmp/camshaft-gpu-cache"
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "gpu-core.json")
    torch.backends.cuda.matmul.allow_tf32 = False
    targets = options.targets.split(",")
    run_families(results, [name for name in options.families.split(",") if name], targets, options.processes)
    if not options.skip_large:
        import gpu_large

        gpu_large.run(results, targets[-1], layers=options.layers, num_requests=options.requests, small=options.small)
    results.write()


if __name__ == "__main__":
    main()
