"""What `bench/cpu_peers.py` and its workers say to each other; needs nothing but Python, as every peer has its own environment.

A worker is one process: one peer at one number of threads. It speaks JSON lines on its stdout:

    worker       {"state": "ready", "info": {...}}       or {"state": "missing", "reason": "..."} and it ends
    cpu_peers    {"prompt": [5, 6, ...], "num_tokens": 128}
    worker       {"tokens": [...], "first_token_s": 0.02, "decode_s": 0.3, "cpu_s": 0.33}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a worker is started with."""

    model: Path
    """Directory of a Hugging Face checkpoint."""
    work: Path
    """Directory for converted models; a worker reuses what it finds there."""
    threads: int
    """Threads to compute with."""
    variant: str
    """Which of a peer's settings to measure, such as the dtype; each worker knows its own."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One greedy generation and when it happened, in seconds of `time.perf_counter()`."""

    tokens: list[int]
    start_s: float
    """Before the prompt was handed over."""
    first_s: float
    """The first token was known."""
    last_s: float
    """The last token was known; between the two, len(tokens) - 1 decode steps were run."""


class MissingPeerError(Exception):
    """The peer is not installed here, or does not know this kind of model; the message says what to do."""


Generate = Callable[[list[int], int], Generated]
"""(prompt token ids, number of tokens) -> greedy tokens, no token ending the generation early."""


def serve(load: Callable[[Options], tuple[Generate, dict[str, Any]]]) -> None:
    """Runs a worker: `load` opens the model and also returns what is worth noting (versions, build options)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--variant", default="")
    options = Options(**vars(parser.parse_args()))
    # libraries print to stdout, from C too: the channel moves to another descriptor, and 1 becomes stderr
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    begin = time.perf_counter()
    try:
        generate, info = load(options)
    except MissingPeerError as error:
        say({"state": "missing", "reason": str(error)})
        return
    info["load_s"] = round(time.perf_counter() - begin, 2)
    say({"state": "ready", "info": info})
    for line in sys.stdin:
        request = json.loads(line)
        cpu_s = time.process_time()
        done = generate(request["prompt"], request["num_tokens"])
        cpu_s = time.process_time() - cpu_s
        say(
            {
                "tokens": done.tokens,
                "first_token_s": done.first_s - done.start_s,
                "decode_s": done.last_s - done.first_s,
                "cpu_s": cpu_s,
            }
        )
