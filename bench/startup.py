"""Start-up, build time and peak memory on this machine, each in processes of its own.

    python bench/startup.py --out bench/results/cpu-startup.json [--repeat 5] [--skip-memory]

import camshaft | load the demo engine and give a first token | build the demo engine without the build cache |
peak host memory of building and saving a random model of about 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

IMPORT = """
import sys, time
start = time.perf_counter()
import camshaft
print(time.perf_counter() - start, int("torch" in sys.modules))
"""
LOAD = """
import sys, time
start = time.perf_counter()
import camshaft
llm = camshaft.LLM(sys.argv[1])
loaded = time.perf_counter()
llm.generate(["Hello"], camshaft.SamplingParams(temperature=0, max_tokens=1))
print(time.perf_counter() - start, loaded - start)
"""
BUILD = """
import sys, time
start = time.perf_counter()
import camshaft
engine = camshaft.compile("demo", cache=False, target=sys.argv[2])
built = time.perf_counter()
engine.save(sys.argv[1], overwrite=True)
print(time.perf_counter() - start, built - start, engine.config.target)
"""
MODEL = """
import sys, transformers
config = transformers.LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=16,
    num_key_value_heads=8, vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
"""
MEMORY = """
import resource, sys, torch, transformers, camshaft
from camshaft.export import build
from camshaft.models import huggingface
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
engine = camshaft.compile(sys.argv[1], device="cpu", target=sys.argv[3], max_seq_len=512, cache=False)
engine.save(sys.argv[2])
print(before, peak(), engine.weights_bytes)
"""


def run(script: str, *arguments: str) -> list[str]:
    """The last line that a fresh Python prints, as words."""
    out = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
    return out.stdout.strip().splitlines()[-1].split()


def summary(values: list[float]) -> dict[str, Any]:
    """Median, spread and all values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    import torch

    import camshaft

    results: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "camshaft": camshaft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as work:
        results["import_s"] = summary([float(run(IMPORT)[0]) for _ in range(options.repeat)])
        builds = [run(BUILD, f"{work}/engine", options.target) for _ in range(3)]
        results["build_and_save_demo_s"] = {**summary([float(words[0]) for words in builds]), "target": builds[0][2]}
        results["build_demo_s"] = summary([float(words[1]) for words in builds])
        loads = [run(LOAD, f"{work}/engine") for _ in range(options.repeat)]
        results["load_to_first_token_s"] = summary([float(words[0]) for words in loads])
        results["load_s"] = summary([float(words[1]) for words in loads])
        if not options.skip_memory:
            subprocess.run([sys.executable, "-c", MODEL, f"{work}/model"], check=True, capture_output=True)
            before, peak, weights = map(int, run(MEMORY, f"{work}/model", f"{work}/large", options.target))
            results["memory_of_a_build"] = {
                "imports_bytes": before,
                "peak_bytes": peak,
                "weights_bytes": weights,
                "build_over_weights": (peak - before) / weights,
                "peak_over_weights": peak / weights,
            }
    results["load_average_after"] = os.getloadavg()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
