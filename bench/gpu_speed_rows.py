"""The rows of bench/gpu_speed.sh: workloads on Llama-3.1-8B, and the options of the one engine that all rows of a precision share.

    python3 bench/gpu_speed_rows.py fp8 > suite.json        the suite of the precision's rows (for `camshaft bench run --suite`)
    python3 bench/gpu_speed_rows.py fp8 --options           the options to build their engine with
    python3 bench/gpu_speed_rows.py fp8 --start             the suite of one start-up

Chosen and changed by the environment: ROWS (names, default: all but the load row), and REQUESTS, SEQUENCES, TOKENS, REPEAT, PROFILE
(steps), WARMUP_REQUESTS for all rows, or with _<row> behind the name ("_" for "-") for one; RATES of the load row; MAX_SEQ_LEN.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from typing import Any

MAX_SEQ_LEN = 2304
"""Tokens of a sequence that the engines are built for: the longest row has 2,176."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A workload: lengths in tokens, requests, and the scheduler's limits."""

    name: str
    input_len: int
    output_len: int
    requests: int
    sequences: int = 1024
    tokens: int = 2048
    mode: str = "throughput"
    repeat: int = 3
    profile: int = 0
    optional: bool = False

    @property
    def precision(self) -> str:
        """ "fp8" (linear layers and KV cache) or "bf16"."""
        return self.name.split("-")[0]


# 816 requests of 2,176 tokens are what the KV cache holds at once; 1,024 of 2,000 fit because they do not all end together.
ROWS = (
    Row(name="fp8-128-128", input_len=128, output_len=128, requests=12288, profile=20),
    Row(name="fp8-b1", input_len=128, output_len=256, requests=4, mode="latency", profile=20),
    Row(name="fp8-1000-1000", input_len=1000, output_len=1000, requests=2048),
    Row(name="fp8-128-2048", input_len=128, output_len=2048, requests=816),
    Row(name="fp8-load", input_len=512, output_len=128, requests=256, mode="load", repeat=1, optional=True),
    Row(name="fp8-2048-128", input_len=2048, output_len=128, requests=1536, tokens=8192, profile=20),
    Row(name="bf16-128-128", input_len=128, output_len=128, requests=12288, sequences=2048, tokens=8192, profile=20),
    Row(name="bf16-b1", input_len=128, output_len=256, requests=4, mode="latency", profile=20),
)
_WARMUP_TOKENS = 1536 * 128
"""Of the prompts of a warm-up run: more than a full batch of short ones, so that steps of all kinds come up."""
STARTS = ("fp8-start", "bf16-start")
"""Rows that open a saved engine in a new process."""


def chosen_names() -> list[str]:
    """The rows to run. Raises SystemExit for an unknown one."""
    known = [row.name for row in ROWS] + list(STARTS)
    names = os.environ.get("ROWS", "").split() or [row.name for row in ROWS if not row.optional] + list(STARTS)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"ROWS names {', '.join(unknown)}; allowed: {' '.join(known)}")
    return names


def number(name: str, row: str, default: int) -> int:
    """NAME_row of the environment, NAME, or the default."""
    key = f"{name}_{row.replace('-', '_')}"
    return int(os.environ.get(key) or os.environ.get(name) or default)


def case_of(row: Row) -> dict[str, Any]:
    """The row as a case of a suite."""
    case: dict[str, Any] = {
        "name": row.name,
        "mode": row.mode,
        "policy": "max_utilization",
        "num_requests": number("REQUESTS", row.name, row.requests),
        "input_len": row.input_len,
        "output_len": row.output_len,
        "repeats": number("REPEAT", row.name, row.repeat),
        "warmup": 1,
        "warmup_requests": number("WARMUP_REQUESTS", row.name, min(row.requests, _WARMUP_TOKENS // row.input_len)),
        "warmup_output_len": 32,
        "max_sequences": number("SEQUENCES", row.name, row.sequences),
        "max_batch_tokens": number("TOKENS", row.name, row.tokens),
        "profile_steps": number("PROFILE", row.name, row.profile),
    }
    if row.mode == "load":
        case |= {"rates": os.environ.get("RATES", "8,16,32,64"), "slos": {"ttft": 200, "tpot": 20}}
    return case


def options_of(precision: str) -> str:
    """What the engine of a precision is built with: limits that all of its rows fit in, so that runs of some rows share a cache."""
    cases = [case_of(row) for row in ROWS if row.precision == precision]
    options = [
        f"--max-seq-len {os.environ.get('MAX_SEQ_LEN', MAX_SEQ_LEN)}",
        f"--max-sequences {max(case['max_sequences'] for case in cases)}",
        f"--max-batch-tokens {max(case['max_batch_tokens'] for case in cases)}",
        "--dtype bfloat16",
    ]
    return " ".join(options + (["--quantize fp8", "--kv-cache-dtype fp8"] if precision == "fp8" else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("precision", choices=("fp8", "bf16"))
    parser.add_argument("--options", action="store_true", help="print the options of the build")
    parser.add_argument("--start", metavar="NUMBER", help="print the suite of one start-up")
    parser.add_argument("--names", action="store_true", help="print the names of the chosen rows")
    arguments = parser.parse_args()
    names = [name for name in chosen_names() if name.startswith(arguments.precision + "-")]
    if arguments.options:
        print(options_of(arguments.precision))
    elif arguments.names:
        print(" ".join(names))
    elif arguments.start:
        name = f"{arguments.precision}-start-{arguments.start}"
        case = {"name": name, "mode": "latency", "num_requests": 1, "input_len": 128, "output_len": 8}
        print(json.dumps({"cases": [{**case, "repeats": 1, "warmup": 0}]}))
    else:
        cases = [case_of(row) for row in ROWS if row.name in names]
        short = {
            "name": f"{arguments.precision}-none",
            "num_requests": 1,
            "input_len": 8,
            "output_len": 2,
            "repeats": 1,
        }
        print(json.dumps({"cases": cases or [short]}, indent=1))


if __name__ == "__main__":
    main()
