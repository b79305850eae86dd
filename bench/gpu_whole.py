"""Whole-graph TensorRT exports on a GPU: the demo model and small families, run by docs/examples/run_engine.py, beside eager.

    python3 bench/gpu_whole.py --out OUT [--cases demo:linear:float32,llama:paged:bfloat16] [--processes 6]

Writes OUT/gpu-whole.json: per case the tokens that agree with Transformers' eager ones in float32 and in the export's dtype, and
what each part took; where they part, how near to a tie float32 is. A case in float32 must agree token for token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASES = (
    "demo:linear:bfloat16,demo:paged:bfloat16,demo:linear:float32,demo:paged:float32,demo:linear:bfloat16:baked,"
    "demo:paged:bfloat16:in-place,llama:linear:float32,gemma2:linear:float32,gemma2:paged:float32,gpt_oss:linear:float32,"
    "gpt_oss:paged:float32,bloom:linear:float32,bloom:paged:float32:in-place,mistral:linear:float32,llama:paged:float16"
)
NUM_TOKENS = 48
PROMPT_LENGTHS = (45, 9)
"""The first takes two chunks of the prefill engine (32 rows), the second less than one."""


def eager_tokens(model: Any, prompt: list[int], device: str) -> list[int]:
    """Greedy tokens of Transformers' eager model, with its own cache."""
    import torch

    ids, cache, tokens = torch.tensor([prompt], device=device), None, []
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[tokens[-1]]], device=device)
    return tokens


def gap(model: Any, prompt: list[int], tokens: list[int], other: list[int], device: str) -> float | None:
    """Where the tokens part: the other token's logit less this one's, as a part of the largest; None if they do not part."""
    import torch

    at = next((i for i, (a, b) in enumerate(zip(tokens, other)) if a != b), None)
    if at is None:
        return None
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:at]], device=device)).logits[0, -1]
    return round(float((logits[other[at]] - logits[tokens[at]]) / logits.abs().max()), 4)


def open_case(name: str) -> Any:
    """The model of a case, float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    if name == "demo":
        from camshaft.models import demo

        return AutoModelForCausalLM.from_pretrained(
            demo.path(), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    sys.path.insert(0, str(HERE.parent / "tests"))
    from families import random_model, tiny_config

    return random_model(tiny_config(name))


def run_case(case: str, folder: Path) -> dict[str, Any]:
    """One export, one run of the example, two references."""
    import torch

    import camshaft

    torch.backends.cuda.matmul.allow_tf32 = False
    name, cache, dtype, *extra = case.split(":")
    model = open_case(name)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    start = time.perf_counter()
    made = camshaft.export_model(
        model if name != "demo" else "demo", folder, format="tensorrt", cache=cache, dtype=dtype, batch_size=2, max_seq_len=128,
        prefill_tokens=32, baked_weights="baked" in extra, progress=False,
    )  # fmt: skip
    entry: dict[str, Any] = {"export_s": round(time.perf_counter() - start, 1)}
    entry["bytes"] = {name: facts["bytes"] for name, facts in made.document["files"].items() if "/" not in name}
    start = time.perf_counter()
    command = [sys.executable, str(HERE.parent / "docs" / "examples" / "run_engine.py"), str(folder), "--ignore-eos"]
    command += ["--max-tokens", str(NUM_TOKENS), *(["--in-place"] if "in-place" in extra else [])]
    for prompt in prompts:
        command += ["--ids", ",".join(map(str, prompt))]
    done = subprocess.run(command, capture_output=True, text=True)
    entry["run_s"] = round(time.perf_counter() - start, 1)
    if done.returncode:
        return entry | {"ok": False, "error": (done.stderr or done.stdout)[-1500:]}
    tokens = json.loads(done.stdout.splitlines()[-1])["tokens"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for wanted in dict.fromkeys(("float32", dtype)):
        reference = model.to(device, getattr(torch, wanted))
        rows = [eager_tokens(reference, prompt, device) for prompt in prompts]
        entry[f"agree_{wanted}"] = [
            next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), NUM_TOKENS) for x, y in zip(tokens, rows)
        ]
        if wanted == "float32":  # how near to a tie float32 itself is where a 16-bit export goes another way
            entry["gap_float32"] = [gap(reference, p, x, y, device) for p, x, y in zip(prompts, tokens, rows)]
    exact = entry["agree_float32"] == [NUM_TOKENS] * len(prompts)
    return entry | {"ok": exact or dtype != "float32", "num_tokens": NUM_TOKENS}


def versions() -> dict[str, str]:
    """The machine and the packages."""
    import tensorrt_rtx
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return {"gpu": gpu, **versions, "tensorrt_rtx": tensorrt_rtx.__version__}


def main() -> None:
    """Runs the cases in processes of their own, several at a time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--case", help="run this one here and print its entry")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.case:
        print(json.dumps(run_case(options.case, options.out / "export")))
        return

    def one(case: str) -> tuple[str, dict[str, Any]]:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--out", folder, "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return case, {"ok": False, "error": done.stderr[-1500:]}
        return case, json.loads(done.stdout.splitlines()[-1])

    results: dict[str, Any] = {"command": "python3 " + " ".join(sys.argv), **versions()}
    with ThreadPoolExecutor(options.processes) as pool:
        for case, entry in pool.map(one, options.cases.split(",")):
            results[case] = entry
            print(case, json.dumps(entry), flush=True)
            (options.out / "gpu-whole.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
