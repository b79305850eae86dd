"""Attention of other libraries beside ours on a GPU: decode over a paged cache, and prefill of fresh prompts.

    python3 bench/attention_peers.py --out OUT [--site DIR] [--only "flashinfer decode,camshaft prefill"] [--limit 90]

Llama-3.1-8B's attention: 32 heads, 8 kv heads, size 128, pages of 16 tokens, bfloat16 queries. Every peer runs in a process of
its own with a time limit, so that one that does not import or compiles too long costs only its own rows. First all of them
run at once up to their first call, which fills the caches of those that compile (--prepare seconds); then each is checked
against ours and timed alone. DIR: a folder that packages were installed into, beside those of this Python.
OUT/attention-peers.json holds every number. Times are sustained, in a CUDA graph; decode without the write of new keys, but
for ours, which is part of its kernel; prefill without the write everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DECODES = {"1024 x 600": (1024, 600), "8 x 1500": (8, 1500)}
PREFILLS = {"64 x 128": [128] * 64, "8 x 1024": [1024] * 8, "4 x 2048": [2048] * 4, "1 x 8192": [8192]}
PEERS = ("camshaft", "flashinfer", "flashinfer fa2", "fa4", "torch")
JOBS = [f"{peer} {kind}" for kind in ("decode", "prefill") for peer in PEERS if (peer, kind) != ("torch", "decode")]


# ------------------------------------------------------------------------------------------------- in a peer's process
def decode_calls(peer: str, step: Any) -> Callable[[], list[Any]]:
    """A call that attends in every layer of a decode step (`attention_steps.Step`) and returns the results."""
    import torch

    if peer == "camshaft":
        return lambda: [step.call(layer, state=step.state) for layer in range(step.layers)]
    from attention_steps import BLOCK, DEVICE, DIM, HEADS, KV

    lens, tables = step.metadata["seq_lens"], step.metadata["block_tables"]
    if peer == "fa4":
        from flash_attn.cute import flash_attn_varlen_func

        starts, longest = step.metadata["query_start"], step.bounds["max_seq_len"]
        return lambda: [
            _first(
                flash_attn_varlen_func(
                    step.q, k, v, cu_seqlens_q=starts, seqused_k=lens, max_seqlen_q=1, max_seqlen_k=longest,
                    page_table=tables, softmax_scale=DIM**-0.5, causal=True,
                )
            )
            for k, v in step.caches
        ]  # fmt: skip
    import flashinfer

    blocks = (lens + BLOCK - 1) // BLOCK
    indptr = torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).int()
    indices = torch.cat([row[:n] for row, n in zip(tables, blocks.tolist())])
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True, backend="fa2" if peer.endswith("fa2") else "auto"
    )
    wrapper.plan(
        indptr, indices, ((lens - 1) % BLOCK + 1).int(), HEADS, KV, DIM, BLOCK, q_data_type=torch.bfloat16,
        kv_data_type=step.caches[0][0].dtype, sm_scale=DIM**-0.5,
    )  # fmt: skip
    return lambda: [wrapper.run(step.q, pair) for pair in step.caches]


def prefill_call(peer: str, prompts: Any) -> Callable[[], Any]:
    """A call that attends over fresh prompts (`attention_fresh.Prompts`)."""
    import torch

    q, k, v, starts, longest = prompts.q, prompts.k, prompts.v, prompts.starts, prompts.max_len
    if peer == "camshaft":
        return lambda: prompts.paged(None)
    if peer == "torch":
        return prompts.cudnn_dense
    if peer == "fa4":
        from flash_attn.cute import flash_attn_varlen_func

        return lambda: _first(
            flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
                softmax_scale=prompts.scale, causal=True,
            )
        )  # fmt: skip
    import flashinfer

    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        workspace, "NHD", backend="fa2" if peer.endswith("fa2") else "auto"
    )
    wrapper.plan(
        starts, starts, q.shape[1], k.shape[1], q.shape[2], causal=True, sm_scale=prompts.scale,
        q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, k, v)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def decode_rows(peer: str, *, prepare: bool) -> list[dict[str, Any]]:
    """Both caches, both shapes; the smaller shape only, once, to prepare."""
    import torch
    from attention_fresh import FAILURES, sustained_us
    from attention_steps import READ_BYTES_PER_S, Step

    rows = []
    for cache in ("bf16", "fp8"):
        for name, (count, length) in [("8 x 1500", DECODES["8 x 1500"])] if prepare else DECODES.items():
            row: dict[str, Any] = {"peer": peer, "kind": "decode", "shape": name, "cache": cache}
            rows.append(row)
            try:
                step = Step([(1, length)] * count, cache)
                ours = step.call(0).float()
                call = decode_calls(peer, step)
                row["max difference from ours"] = round((call()[0].float() - ours).abs().max().item(), 5)
                if prepare:
                    torch.cuda.synchronize()
                    continue
                us = sustained_us(call) / step.layers
                rate = step.bytes_read / us * 1e6
                row |= {"us": round(us, 2), "GB/s": round(rate / 1e9), "share": round(rate / READ_BYTES_PER_S, 3)}
            except (*FAILURES, ImportError, AttributeError) as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)
    return rows


def prefill_rows(peer: str, *, prepare: bool) -> list[dict[str, Any]]:
    """All shapes; one of them, once, to prepare. Ours with its write taken off."""
    import torch
    from attention_fresh import FAILURES, Prompts, sustained_us

    rows = []
    for name, lengths in [("8 x 1024", PREFILLS["8 x 1024"])] if prepare else PREFILLS.items():
        row: dict[str, Any] = {"peer": peer, "kind": "prefill", "shape": name}
        rows.append(row)
        try:
            prompts = Prompts(lengths, 128)
            call = prefill_call(peer, prompts)
            difference = (call().float() - prompts.paged("paged").float()).abs().max().item()
            row["max difference from ours"] = round(difference, 5)
            if prepare:
                torch.cuda.synchronize()
                continue
            us = sustained_us(call)
            if peer == "camshaft":
                us -= sustained_us(lambda p=prompts: p.paged("paged", max_query_len=0))
            row |= {"us": round(us, 1), "TFLOP/s": round(prompts.flops / us / 1e6, 1)}
        except (*FAILURES, ImportError, AttributeError) as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(row), flush=True)
    return rows


def run_job(job: str, *, prepare: bool) -> None:
    """One peer, one kind: a line of JSON for every row."""
    import torch

    peer, kind = job.rsplit(" ", 1)
    with torch.inference_mode():
        (decode_rows if kind == "decode" else prefill_rows)(peer, prepare=prepare)


# ------------------------------------------------------------------------------------------------------------ the parent
def start(job: str, folder: Path | None, *, prepare: bool) -> subprocess.Popen[str]:
    """A process that runs one job."""
    command = [sys.executable, __file__, "--job", job, *(["--prepare-only"] if prepare else [])]
    command += ["--site", str(folder)] if folder else []
    environment = os.environ | {"MAX_JOBS": "8", "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(job: str, process: subprocess.Popen[str], limit_s: float) -> list[dict[str, Any]]:
    """The rows that a process printed; one more that says how it ended, if not well."""
    ended = None
    try:
        output = process.communicate(timeout=max(1.0, limit_s))[0]
        if process.returncode:
            ended = f"exit {process.returncode}: " + " | ".join(output.strip().splitlines()[-3:])[-400:]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0]
        ended = "ran past its time limit"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"peer"')]
    return rows + ([{"peer": job, "error": ended}] if ended else [])


def main() -> int:
    """Prepares, then times job after job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--site", type=Path, help="a folder with the peers' packages")
    parser.add_argument("--only", default=",".join(JOBS), help="of " + ", ".join(JOBS))
    parser.add_argument("--limit", type=float, default=90, help="seconds for a job")
    parser.add_argument("--prepare", type=float, default=150, help="seconds for all first calls, which run at once")
    parser.add_argument("--job", help="run one job in this process")
    parser.add_argument("--prepare-only", action="store_true", help="of a job: its first call alone")
    options = parser.parse_args()
    if options.site:
        site.addsitedir(str(options.site))
    if options.job:
        run_job(options.job, prepare=options.prepare_only)
        return 0
    if options.out is None:
        parser.error("--out is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    unknown = set(options.only.split(",")) - set(JOBS)
    if unknown:
        parser.error(f"--only names {sorted(unknown)}; allowed are {JOBS}")
    jobs = [job for job in JOBS if job in options.only.split(",")]
    from camshaft.runtime.bench.environment import git_commit, machine, package_versions

    packages = ("torch", "triton", "flashinfer-python", "flash-attn-4", "nvidia-cutlass-dsl")
    results: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv), "machine": machine(), "versions": package_versions(packages),
        "commit": git_commit(), "prepare": [], "rows": [],
    }  # fmt: skip
    end = time.monotonic() + options.prepare
    processes = {job: start(job, options.site, prepare=True) for job in jobs}
    for job, process in processes.items():
        results["prepare"] += finish(job, process, end - time.monotonic())
    print("prepared", *results["prepare"], sep="\n", flush=True)
    for job in jobs:
        results["rows"] += finish(job, start(job, options.site, prepare=False), options.limit)
        (options.out / "attention-peers.json").write_text(json.dumps(results, indent=1))
    for row in results["rows"]:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
