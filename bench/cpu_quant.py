"""Decode speed at batch 1 and memory of quantized engines on the CPU, beside float32 in the same run.

    python bench/cpu_quant.py --out bench/results/cpu-quant.json [--shapes demo,llama-3.2-1b] [--layers 16] [--threads 2]
    python bench/cpu_quant.py --out bench/results/cpu-kv-int8-1b.json --shapes llama-3.2-1b --layers 4 --context 1000 --sequences 4
        --tokens 16 --repeats 4 --variants "float32;KV int8;KV fp8"

Every variant is compiled for ONNX Runtime, serves in a process of its own and is measured alone. Shapes are those of
`camshaft.models.random_weights` (random weights; rounded to bfloat16 but for "not bfloat16", as most checkpoints are stored), and
"demo", the bundled model. Decode speed is that of the tokens after the first; a value is the median of --repeats generations, with
the fastest and slowest. "sessions alone" has no native step: every token goes through ONNX Runtime. Memory is the resident set of
the process after the last generation, less what it was before the model was opened. With --sequences a time is that of a step with
one token of each; their prompts, of --context tokens, are in the prefix cache but for the first time, whose first token is "cold".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo" / "data" / "camshaft-demo"
BASELINE = "float32"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, not bfloat16": {"exact": False},
    "int8": {"quantize": "int8"},
    "int8_weight_only": {"quantize": "int8_weight_only"},
    "int4": {"quantize": "int4"},
    "float32, sessions alone": {"native": False},
    "int8, sessions alone": {"quantize": "int8", "native": False},
    "int4, sessions alone": {"quantize": "int4", "native": False},
    "KV int8": {"kv": "int8"},
    "KV fp8": {"kv": "fp8"},
    "int8, KV int8": {"quantize": "int8", "kv": "int8"},
    "KV int8, torch reference": {"kv": "int8", "native": False, "reference": True},
}
"""What is compared: `quantize`, the KV cache's dtype, whether weights are numbers of bfloat16, whether there is a native step, and
whether attention is the torch reference."""


# --------------------------------------------------------------------------------------------------- one variant, a process
def random_model(shape: str, num_layers: int, exact: bool) -> Any:
    """A model of a public shape with random float32 weights; exact: that bfloat16 holds."""
    from camshaft.graph.weights import Weight
    from camshaft.models.random_weights import RandomWeights

    class Rounded(RandomWeights):
        def open(self, dtype: Any) -> Any:
            source = super().open(dtype)
            source.weights.update({name: rounded(weight) for name, weight in source.weights.items()})
            return source

    def rounded(weight: Any) -> Any:
        import torch

        return Weight(weight.shape, weight.dtype, lambda: weight.load().to(torch.bfloat16).to(weight.dtype))

    made = (Rounded if exact else RandomWeights).of(shape, device="cpu")
    made.config.num_hidden_layers = num_layers or made.config.num_hidden_layers
    return made


def resident_bytes() -> int:
    """The process's resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def calibration_of(shape: str, vocab_size: int) -> Any:
    """What an int8 KV cache finds its scales on: the demo model's text, tokens in any order for random weights."""
    if shape == "demo":
        return [(DEMO.parent / "calibration.txt").read_text()[:8000]]
    return [[(start + 7919 * token) % vocab_size for token in range(256)] for start in (3, 11)]


def work(options: dict[str, Any]) -> dict[str, Any]:
    """Compiles a variant, decodes, and returns what was measured."""
    import onnxruntime
    import torch
    from camshaft.export import engine as engine_module
    from camshaft.export.kernels import dispatch

    import camshaft

    torch.set_num_threads(options["threads"])
    if not options.get("native", True):
        engine_module.make_native_step = lambda *_: (None, "no native step: left out for this measurement")
    if options.get("reference"):
        dispatch.cpu.supports = lambda *_: False
    shape, exact, context = options["shape"], options.get("exact", True), options["prompt"]
    model = str(DEMO) if shape == "demo" else random_model(shape, options["layers"], exact)
    before, start = resident_bytes(), time.perf_counter()
    engine = camshaft.compile(
        model, target="onnxruntime", device="cpu", dtype="float32", quantize=options.get("quantize"),
        kv_cache_dtype=options.get("kv", "auto"), max_seq_len=max(512, context + options["tokens"] + 8),
        calibration=calibration_of(shape, 32_000) if options.get("kv") == "int8" else None,
        max_sequences=options["sequences"], cache=False, progress=False,
    )  # fmt: skip
    build_s = time.perf_counter() - start
    llm = camshaft.LLM(engine)
    params = camshaft.SamplingParams(temperature=0, max_tokens=options["tokens"], ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [5 + (17 * s + t) % 4000 for t in range(context)]} for s in range(options["sequences"])
    ]
    decode, first, cold_s = [], [], 0.0
    for repeat in range(options["repeats"] + 1):
        offset = time.perf_counter() - time.monotonic()
        begun = time.perf_counter()
        metrics = [output.metrics for output in llm.generate(prompts, params)]
        first_s, last_s = (max(getattr(m, name) for m in metrics) + offset for name in ("first_token_s", "finished_s"))
        if repeat:  # the first warms up
            first.append(first_s - begun)
            decode.append((last_s - first_s) / (options["tokens"] - 1))
        else:
            cold_s = first_s - begun
    token_bytes = sum(group.bytes_per_block for group in engine.cache_groups) / engine.manifest.cache.block_size
    return {
        "decode_ms": spread(decode),
        "first_token_ms": spread(first),
        "cold_first_token_ms": round(1e3 * cold_s, 1),
        "kv_mb": round(token_bytes * options["sequences"] * (context + options["tokens"]) / 1e6, 2),
        "memory_mb": round((resident_bytes() - before) / 1e6, 1),
        "weights_mb": round(engine.weights_bytes / 1e6, 1),
        "num_layers": len(engine.manifest.cache.layers),
        "native_step": engine.native_step,
        "report": list(engine.manifest.report),
        "build_s": round(build_s, 1),
        "versions": {
            "camshaft": camshaft.__version__,
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest in milliseconds."""
    of = {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    return {name: round(1e3 * value, 3) for name, value in of.items()}


# ----------------------------------------------------------------------------------------------------------- all variants
@dataclasses.dataclass(frozen=True)
class Run:
    """One line of the result."""

    shape: str
    variant: str

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """Runs the variant in a process of its own; a failure is recorded, not raised."""
        options = {"shape": self.shape, "threads": args.threads, "repeats": args.repeats, **VARIANTS[self.variant]}
        small = self.shape == "demo"
        options |= {
            "layers": args.layers,
            "tokens": 64 if small and args.context == 32 else args.tokens,
            "prompt": args.context,
        }
        options |= {"sequences": args.sequences}
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        command = [sys.executable, __file__, "--worker", json.dumps(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        entry: dict[str, Any] = {"shape": self.shape, "variant": self.variant, "load_before": os.getloadavg()[0]}
        if done.returncode:
            return entry | {"error": done.stderr.strip().splitlines()[-5:]}
        return entry | json.loads(done.stdout.splitlines()[-1])


def table(entries: list[dict[str, Any]]) -> str:
    """What a reader wants to see, with speed relative to float32 of the same shape."""
    lines = [f"{'shape':<14} {'variant':<24} {'ms/token':>9} {'range':>17} {'x float32':>9} {'memory MB':>10}"]
    base = {e["shape"]: e["decode_ms"]["median"] for e in entries if e["variant"] == BASELINE and "decode_ms" in e}
    for entry in entries:
        head = f"{entry['shape']:<14} {entry['variant']:<24}"
        if "error" in entry:
            lines.append(f"{head} failed: {entry['error'][-1:]}")
            continue
        ms = entry["decode_ms"]
        relative = f"{base[entry['shape']] / ms['median']:.2f}" if entry["shape"] in base else "-"
        ends = f"{ms['fastest']:.2f}-{ms['slowest']:.2f}"
        lines.append(f"{head} {ms['median']:>9.2f} {ends:>17} {relative:>9} {entry['memory_mb']:>10.1f}")
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor, as /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", default="demo,llama-3.2-1b")
    usual = ";".join(name for name, options in VARIANTS.items() if "kv" not in options)
    parser.add_argument("--variants", default=usual, help=f"separated by semicolons; there are {'; '.join(VARIANTS)}")
    parser.add_argument("--layers", type=int, default=0, help="layers of random models; 0: as the shape has them")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--sequences", type=int, default=1, help="sequences that decode at once")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of random models")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return
    entries = []
    for shape in args.shapes.split(","):
        for variant in args.variants.split(";"):
            if shape == "demo" and not VARIANTS[variant].get("exact", True):
                continue
            entries.append(Run(shape, variant).measure(args))
            print(table(entries[-1:]).splitlines()[1], flush=True)
            if args.out:
                facts = {
                    "command": sys.argv[1:],
                    "cpu": cpu_name(),
                    "threads": args.threads,
                    "python": platform.python_version(),
                }
                args.out.write_text(json.dumps({**facts, "repeats": args.repeats, "entries": entries}, indent=1) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
