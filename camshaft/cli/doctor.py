"""`camshaft doctor`: what is installed, what works here, and what to install otherwise."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, Output, format_bytes, output, table

if TYPE_CHECKING:
    import torch

EXAMPLES = "Example: [bold]camshaft doctor --no-self-test[/] (a few seconds)"


def doctor(
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test/--no-self-test",
            help="Compile a tiny model for every target and compare its tokens with Transformers' own.",
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: packages, GPUs, compilers, targets, attention kernels, TensorRT, caches, memory, and a self-test.

    Exit code 0 if the default target works.
    """
    with output(as_json) as to:
        facts = gather()
        to.document = facts
        _print(to, facts)
        if self_test:
            facts["self_test"] = _self_tests(to, facts)
            facts["tensorrt"]["self_test"] = _tensorrt_self_test(to, facts)
        default = facts["default_target"]
        device = facts["default_device"]
        result = next((t for t in facts.get("self_test", []) if t["target"] == default), None)
        facts["ok"] = default is not None and (result is None or result["ok"])
        if not facts["ok"]:
            to.print(f"the default target ({default} on {device}) does not work here", style="bold red")
            raise typer.Exit(1)
        tested = "works" if result is not None else "should work (not tested)"
        to.print(f"the default target, {default} on {device}, {tested}", style="bold green")


def gather() -> dict[str, Any]:
    """Everything but the self-test, as plain data."""
    import torch

    from ..export.cache import cache_root
    from ..export.kernels.dispatch import describe
    from ..runtime.bench.environment import cpu_model, package_versions, usable_cores
    from ..runtime.memory import host_memory

    free, total = host_memory() if Path("/proc/meminfo").is_file() else (None, None)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    targets = {device: _targets(torch.device(device)) for device in devices}
    default_device = devices[-1]
    root = cache_root()
    return {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": usable_cores(), "vector": torch.backends.cpu.get_cpu_capability()},
        "torch_threads": torch.get_num_threads(),
        "memory": {"free_bytes": free, "total_bytes": total},
        "packages": package_versions(),
        "gpus": _gpus(),
        "cuda_of_torch": torch.version.cuda,
        "compilers": _compilers(),
        "targets": targets,
        "default_device": default_device,
        "default_target": _default_target(targets[default_device], default_device),
        "attention": describe(),
        "tensorrt": _tensorrt(),
        "torch_tensorrt": _torch_tensorrt(),
        "cache": {"directory": str(root), "bytes": _directory_bytes(root), "writable": _writable(root)},
        "environment": {
            key: value for key, value in os.environ.items() if key.startswith(("CAMSHAFT_", "OMP_", "CUDA_VISIBLE"))
        },
    }


def _targets(device: torch.device) -> dict[str, str | None]:
    from ..export.targets.base import available_targets

    return available_targets(device)


def _default_target(targets: dict[str, str | None], device: str) -> str | None:
    """The best target that "auto" would consider."""
    order = ("inductor", "eager") if device == "cuda" else ("onnxruntime", "eager")
    return next((name for name in order if name in targets and targets[name] is None), None)


def _tensorrt() -> dict[str, Any]:
    """Which TensorRT is here: {"flavour", "version", "problem"}; the problem names the fix, None where there is none."""
    from ..export.targets.base import LoweringError
    from ..export.tensorrt.library import find_library

    try:
        library = find_library()
    except LoweringError as error:
        return {"flavour": None, "version": None, "problem": str(error)}
    return {"flavour": library.flavour, "version": library.version, "problem": None}


def _torch_tensorrt() -> dict[str, Any]:
    """The same of Torch-TensorRT: {"package", "version", "problem"}."""
    import torch

    from ..export.targets.torch_tensorrt import TorchTensorRtTarget

    target = TorchTensorRtTarget()
    package, version = next(iter(target.versions().items()), (None, None))
    return {"package": package, "version": version, "problem": target.unavailable(torch.device("cuda"))}


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {"name": facts.name, "capability": f"{facts.major}.{facts.minor}", "free_bytes": free, "total_bytes": total}
        )
    return found


def _compilers() -> dict[str, str | None]:
    """Compiler -> first line of its --version, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in ("cc", "g++", "clang++", "nvcc"):
        path = shutil.which(name)
        found[name] = None
        if path is not None:
            try:
                run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
            except (OSError, subprocess.TimeoutExpired) as error:
                found[name] = f"{path} does not run: {error}"
                continue
            lines = run.stdout.strip().splitlines()
            found[name] = lines[-1 if name == "nvcc" else 0] if lines else path
    return found


def _directory_bytes(root: Path) -> int:
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) if root.is_dir() else 0


def _writable(root: Path) -> bool:
    existing = next(path for path in (root, *root.parents) if path.exists())
    return os.access(existing, os.W_OK)


def _print(to: Output, facts: dict[str, Any]) -> None:
    memory, cache, cpu = facts["memory"], facts["cache"], facts["cpu"]
    gpus = [
        f"{g['name']}, compute {g['capability']}, {format_bytes(g['free_bytes'])} of {format_bytes(g['total_bytes'])} free"
        for g in facts["gpus"]
    ]
    compilers = [f"{name}: {line}" for name, line in facts["compilers"].items() if line]
    free = (
        "unknown"
        if memory["free_bytes"] is None
        else f"{format_bytes(memory['free_bytes'])} of {format_bytes(memory['total_bytes'])} free"
    )
    rows = [
        ["python", f"{facts['python']} ({facts['executable']})"],
        ["platform", facts["platform"]],
        ["cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['vector']}, torch uses {facts['torch_threads']} threads"],
        ["memory", free],
        ["gpu", "; ".join(gpus) or f"none that torch sees (torch is built for {_cuda_text(facts['cuda_of_torch'])})"],
        [
            "compilers",
            "; ".join(compilers) or "none: install g++ (Debian: apt-get install g++) for the fast CPU attention",
        ],
        ["packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)],
        ["missing", ", ".join(name for name, version in facts["packages"].items() if not version) or "nothing"],
        [
            "cache",
            f"{cache['directory']}, {format_bytes(cache['bytes'])}"
            + ("" if cache["writable"] else " - NOT WRITABLE: set CAMSHAFT_CACHE"),
        ],
    ]
    to.console.print(table("This machine", ["", ""], rows, left=(0, 1)))
    rows = []
    for device, targets in facts["targets"].items():
        for name, why in targets.items():
            note = "default" if (device, name) == (facts["default_device"], facts["default_target"]) else ""
            rows.append([name, device, "yes" if why is None else "no", note if why is None else why])
    to.console.print(table("Targets", ["target", "device", "works", ""], rows, left=(0, 1, 2, 3)))
    rows = [[name, *_kernel_text(entry)] for name, entry in facts["attention"].items()]
    to.console.print(table("Attention kernels", ["for", "works", ""], rows, left=(0, 1, 2)))
    to.console.print(table("TensorRT", ["package", "version", ""], _tensorrt_rows(facts), left=(0, 1, 2)))


def _tensorrt_rows(facts: dict[str, Any]) -> list[list[str]]:
    trt, torch_trt = facts["tensorrt"], facts["torch_tensorrt"]
    if trt["problem"] is None:
        use = "builds engines and runs them" if facts["gpus"] else "builds engines; running them needs a GPU"
        rows = [[trt["flavour"], trt["version"], use]]
    else:
        rows = [["TensorRT", "-", trt["problem"]]]
    return [
        *rows,
        [
            torch_trt["package"] or "Torch-TensorRT",
            torch_trt["version"] or "-",
            torch_trt["problem"] or "compiles modules",
        ],
    ]


def _cuda_text(version: str | None) -> str:
    return "the CPU only" if version is None else f"CUDA {version}"


def _kernel_text(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, dict):
        return "yes", str(entry)
    if not entry["available"]:
        return "no", str(entry["reason"])
    shown = [str(entry[key]) for key in ("compiler", "flags", "note") if entry.get(key)]
    shown += [f"triton {entry['triton']}"] if "triton" in entry else []
    return "yes", "; ".join(shown)


# ------------------------------------------------------------------------------------------------------------ self-test
def _self_tests(to: Output, facts: dict[str, Any]) -> list[dict[str, Any]]:
    from .progress import progress_bar

    device = facts["default_device"]
    names = [name for name, why in facts["targets"][device].items() if why is None]
    results = []
    with progress_bar() as report:
        for index, name in enumerate(names):
            report(f"self-test of {name}", index, len(names))
            results.append(run_self_test(name, device))
    rows = []
    for result in results:
        rows.append(
            [
                result["target"],
                device,
                "ok" if result["ok"] else "FAILED",
                f"{result['seconds']:.1f} s",
                result["detail"],
            ]
        )
    title = "Self-test: a 2-layer random Llama, greedy tokens against Transformers"
    to.console.print(table(title, ["target", "device", "", "time", ""], rows, left=(0, 1, 2, 4)))
    return results


def run_self_test(target: str, device: str) -> dict[str, Any]:
    """Compiles a random Llama for a target and compares its greedy tokens with Transformers' eager ones, in float32.

    Returns {"target", "ok", "seconds", "detail"}; a target that fails does not raise.
    """
    start = time.perf_counter()
    try:
        ok, detail = _test_target(target, device)
    except (RuntimeError, ValueError, OSError) as error:
        ok, detail = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {"target": target, "device": device, "ok": ok, "seconds": time.perf_counter() - start, "detail": detail}


def _tensorrt_self_test(to: Output, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Builds a small engine, and runs it where a GPU is: `export/tensorrt/selftest.py`. None where TensorRT is missing."""
    import dataclasses

    from ..export.tensorrt.selftest import self_test

    if facts["tensorrt"]["problem"] is not None:
        return None
    made = self_test()
    built = "" if made.build_s is None else f"{1e3 * made.build_s:.0f} ms, {format_bytes(made.engine_bytes or 0)}"
    ran = "" if made.ms is None else f"{made.ms:.3f} ms"
    row = [facts["tensorrt"]["flavour"], "ok" if made.ok else "FAILED", built, ran, made.detail]
    title = "Self-test of TensorRT: an engine of a norm and a linear layer"
    to.console.print(table(title, ["", "", "build", "run", ""], [row], left=(0, 1, 4)))
    return dataclasses.asdict(made)


def _test_module(target: str, device: str) -> tuple[bool, str]:
    """For a target that takes no decoders: a small MLP against PyTorch."""
    import torch
    from torch import nn

    import camshaft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
        x = torch.randn(4, 64)
    with torch.inference_mode():
        expected = module(x)
    compiled = camshaft.compile(module.to(device), (x.to(device),), target=target)
    error = float((compiled(x.to(device)).cpu() - expected).abs().max())
    return error <= 1e-4, f"an MLP: largest difference from PyTorch {error:.1e}"


def _test_target(target: str, device: str) -> tuple[bool, str]:
    if target == "torch_tensorrt":
        return _test_module(target, device)
    import torch

    import camshaft

    model = random_llama()
    prompts = [[5, 9, 2, 77, 31], [100, 4], list(range(10, 40))]
    engine = camshaft.compile(
        model,
        target=target,
        device=device,
        dtype="float32",
        max_seq_len=128,
        max_batch_tokens=64,
        max_sequences=4,
        cache=False,
        progress=False,
    )
    params = camshaft.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    try:
        kv_bytes = 4 * 128 * sum(layer.bytes_per_token for layer in engine.manifest.cache.layers)
        with camshaft.LLM(engine, kv_cache_bytes=kv_bytes) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, progress=False)
    finally:
        if engine.engine_dir.is_relative_to(tempfile.gettempdir()):
            shutil.rmtree(engine.engine_dir, ignore_errors=True)
    equal = total = 0
    for prompt, result in zip(prompts, outputs):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in result.token_ids:
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        total += len(result.token_ids)
        equal += sum(a == b for a, b in zip(result.token_ids, tokens[len(prompt) :]))
    return equal == total, f"{equal} of {total} tokens equal"


def random_llama() -> Any:
    """A Llama of 2 layers with fixed random weights, float32, whose tokens are far from ties."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model
