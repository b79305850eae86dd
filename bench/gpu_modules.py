"""Encoders through `camshaft.compile(module, example_inputs, target=...)`: build, error, milliseconds per call, by target.

    python3 bench/gpu_modules.py --out OUT [--models vit,bert] [--dtypes float32,float16] [--targets eager,torch_tensorrt]

ViT-B/16 (batch 8, 224 x 224) and BERT-base (batch 8, 128 tokens, padded), random weights. Writes OUT/gpu-modules.json. Every
target runs in a process of its own, "plain" (the module itself) first; what fails is recorded and the rest goes on. Calls are
timed on a stream of their own, and once more on the default one, on which TensorRT waits for the whole device.
`--small --device cpu` tries the script on any machine.
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
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODELS = ("vit", "bert")
TARGETS = ("plain", "eager", "inductor", "torch_tensorrt", "tensorrt")
CALLS, WARMUP = 30, 5
PACKAGES = (
    "camshaft", "torch", "transformers", "triton", "tensorrt", "tensorrt_rtx", "torch-tensorrt", "torch-tensorrt-rtx", "numpy",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- models
def make_model(name: str, small: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """(module in fp32 with fixed random weights, its keyword arguments), on the CPU."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    inputs: dict[str, Tensor]
    if name == "vit":
        vit = transformers.ViTConfig(**({**sizes, "image_size": 32} if small else {}))
        model: nn.Module = transformers.ViTModel(vit)
        inputs = {"pixel_values": torch.randn(8, 3, vit.image_size, vit.image_size)}
    else:
        bert = transformers.BertConfig(**(sizes if small else {}))
        model = transformers.BertModel(bert)
        tokens = 16 if small else 128
        lengths = torch.linspace(tokens // 2, tokens, 8).long()  # a mask that matters
        mask = (torch.arange(tokens)[None, :] < lengths[:, None]).long()
        inputs = {"input_ids": torch.randint(0, bert.vocab_size, (8, tokens)), "attention_mask": mask}
    for parameter in model.parameters():  # fresh weights are small: larger ones show errors
        if parameter.dim() > 1:
            parameter.data.mul_(2)
    return model.eval(), inputs


def errors(result: Any, expected: Any) -> dict[str, float]:
    """max: the largest absolute difference of the last hidden state; relative: the norm of the difference to the norm."""
    a, b = result["last_hidden_state"].double().cpu(), expected["last_hidden_state"].double().cpu()
    return {"max": float((a - b).abs().max()), "relative": float((a - b).norm() / b.norm())}


# ------------------------------------------------------------------------------------------------------------- timing
def spread(times: list[float]) -> dict[str, float]:
    """Median, smallest and largest, in ms."""
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}


def call_times(call: Callable[[], Any], device: torch.device, own_stream: bool = True) -> dict[str, float]:
    """CALLS calls after some that warm up; on a GPU its own time between two events, the host's launches included."""
    if device.type != "cuda":
        seconds = []
        for index in range(WARMUP + CALLS):
            start = time.perf_counter()
            call()
            if index >= WARMUP:
                seconds.append(1e3 * (time.perf_counter() - start))
        return spread(seconds)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device) if own_stream else torch.cuda.default_stream(device)):
        for _ in range(WARMUP):
            call()
        torch.cuda.current_stream(device).synchronize()
        for first, last in events:
            first.record()
            call()
            last.record()
    torch.cuda.synchronize(device)
    return spread([first.elapsed_time(last) for first, last in events])


def graph_times(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The same of a call captured in a CUDA graph, with the error of a replay against a call. Raises what the capture raises."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            expected = call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    timed = call_times(graph.replay, device)
    return {**timed, "error": errors(result, expected)}


# ------------------------------------------------------------------------------------------------------------- a case
@torch.no_grad()
def measure(
    name: str, dtype: torch.dtype, target: str, device: torch.device, small: bool, record: dict[str, Any]
) -> None:
    """Fills `record` for one model, dtype and target."""
    import camshaft

    model, inputs = make_model(name, small)
    given = {key: (x.to(dtype) if x.is_floating_point() else x).to(device) for key, x in inputs.items()}
    exact = model.to(device)(**{key: x.to(device) for key, x in inputs.items()})
    model = model.to(dtype)
    plain = model(**given)
    record["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if target == "plain":
        call: Callable[[], Any] = lambda: model(**given)  # noqa: E731
    else:
        start = time.perf_counter()
        compiled = camshaft.compile(model, given, target=target, device=str(device))
        record["build_s"] = time.perf_counter() - start
        segments = compiled.plan.segments
        record["segments"] = len(segments)
        record["in_pytorch"] = sorted({op for s in segments.values() if s.eager for op in s.operators})
        record["report"] = compiled.report
        call = lambda: compiled(**given)  # noqa: E731
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        record["first_call_s"] = time.perf_counter() - start
    result = call()
    record["error"] = errors(result, plain)
    record["error_from_fp32"] = errors(result, exact)
    record["call"] = call_times(call, device)
    if device.type == "cuda":
        record["call_on_default_stream"] = call_times(call, device, own_stream=False)
        try:
            record["graph"] = graph_times(call, device)
        except RuntimeError as error:
            record["graph"] = {"failed": str(error).strip().splitlines()[0]}


def child(options: argparse.Namespace) -> None:
    """All models and dtypes of one target; a line of JSON for each to `options.child`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with open(options.child, "a") as file:
        for name in options.models.split(","):
            for dtype in options.dtypes.split(","):
                record: dict[str, Any] = {"model": name, "dtype": dtype, "target": options.targets}
                device = torch.device(options.device)
                try:
                    measure(name, getattr(torch, dtype), options.targets, device, options.small, record)
                except Exception as error:
                    record["failed"] = f"{type(error).__name__}: {error}"
                    record["trace"] = traceback.format_exc()[-3000:]
                file.write(json.dumps(record) + "\n")
                file.flush()


# --------------------------------------------------------------------------------------------------------- everything
def run_target(target: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a target, from a process of its own."""
    print(f"{target} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="camshaft-modules-") as directory:
        lines = Path(directory) / "records"
        lines.touch()
        command = [
            sys.executable, __file__, "--out", str(options.out), "--child", str(lines), "--targets", target,
            "--models", options.models, "--dtypes", options.dtypes, "--device", options.device,
            *(["--small"] if options.small else []),
        ]  # fmt: skip
        environment = {**os.environ, "CAMSHAFT_CACHE": str(Path(directory) / "cache")}
        log = Path(directory) / "log"
        with log.open("w") as errors_file:
            try:
                done = subprocess.run(command, env=environment, stderr=errors_file, timeout=options.limit_s)
                ended = f"the process ended with code {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"not done within {options.limit_s} s"
        last = log.read_text(errors="replace")[-3000:]
        records = [json.loads(line) for line in lines.read_text().splitlines()]
    found = {(record["model"], record["dtype"]) for record in records}
    for name in options.models.split(","):
        for dtype in options.dtypes.split(","):
            if (name, dtype) not in found:
                missing = {"model": name, "dtype": dtype, "target": target, "failed": ended, "trace": last}
                records.append(missing)
    for record in records:
        if "trace" in record:
            print(f"{target}, {record['model']} {record['dtype']}: {record['failed']}\n{record['trace']}", flush=True)
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """One line for each model, dtype and target."""
    head = ("model", "dtype", "target", "build s", "max error", "relative", "ms", "min - max", "graph ms", "")
    rows = [head]
    for record in sorted(records, key=lambda r: (r["model"], r["dtype"])):
        key = (record["model"], record["dtype"], record["target"])
        if "failed" in record:
            rows.append((*key, *("-",) * 6, f"FAILED: {record['failed'].splitlines()[0][:120]}"))
            continue
        call, graph = record["call"], record.get("graph", {})
        replayed = f"{graph['ms']:.3f}" if "ms" in graph else "-"
        notes = [f"in PyTorch: {', '.join(record['in_pytorch'])}"] if record.get("in_pytorch") else []
        notes += [f"graph: {graph['failed'][:80]}"] if "failed" in graph else []
        rows.append((
            *key, f"{record['build_s']:.1f}" if "build_s" in record else "-", f"{record['error']['max']:.1e}",
            f"{record['error']['relative']:.1e}", f"{call['ms']:.3f}", f"{call['ms_min']:.3f} - {call['ms_max']:.3f}",
            replayed, "; ".join(notes),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def versions() -> dict[str, str]:
    """The packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu-modules.json")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="float32,float16")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit-s", type=int, default=500, help="seconds for one target, all models and dtypes")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for text, allowed in ((options.models, MODELS), (options.targets, TARGETS)):
        if unknown := set(text.split(",")) - set(allowed):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; give --device cpu --small to try the script")
    if options.child:
        child(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "small": options.small,
        "calls": CALLS,
        "tf32": False,
        "records": [],
    }
    for target in options.targets.split(","):
        document["records"] += run_target(target, options)
        (options.out / "gpu-modules.json").write_text(json.dumps(document, indent=1) + "\n")
    print_table(document["records"])


if __name__ == "__main__":
    main()
