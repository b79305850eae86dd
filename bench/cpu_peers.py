"""Decode speed of one model at batch 1 on the CPU: Camshaft, Transformers, ONNX Runtime GenAI and llama.cpp in one interleaved run.

    python bench/cpu_peers.py --model models/demo/data/camshaft-demo --out peers.json \\
        --genai-python VENV/bin/python --llamacpp-python VENV/bin/python

The peers may live in environments of their own (the heads of bench/peers/run_genai.py and run_llamacpp.py say what to
install); one that is not installed is reported as missing. Every peer runs once per number of threads, each in a process of
its own that stays open and idle while the others are measured. Everything is greedy, in float32 unless the name says
otherwise, with prompts of 32 token ids and 128 new tokens, no token ending the generation early. Decode speed is the 127
tokens after the first, divided by the time from the first token to the last. CPU time is that of all of a process's threads
over a whole generation, per new token; it tells more than the clock does where other work shares the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEERS_DIR = Path(__file__).resolve().parent / "peers"
REFERENCE = "transformers eager"
TEXTS = (
    "The harbour was quiet in the morning. Two fishermen mended their nets on the quay while a third sorted the catch into "
    "wooden boxes, and the gulls waited on the roof of the old customs house.",
    "A compiler reads a program, checks that it makes sense, and writes another program that does the same work with fewer "
    "steps. What it may change is decided by rules that were written down long before.",
    "Question: how does a bicycle stay upright when it moves? Answer: the rider steers a little towards the side to which "
    "the bicycle leans, and the wheels come back under the weight.",
    "In the spring of that year the river rose higher than anyone could remember. The bridge at the mill was closed, and "
    "the letters had to be carried across in a small boat.",
    "To make the dough, mix flour, water, salt and yeast in a large bowl, and knead it for ten minutes. Cover it and leave "
    "it in a warm place until it has doubled in size.",
)
"""What the prompts are cut from; written for this benchmark."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One line of the table."""

    name: str
    python: str
    """Interpreter of its environment."""
    script: str
    """Its worker in bench/peers."""
    variant: str = ""


@dataclass(kw_only=True)
class Worker:
    """A peer's process at one number of threads, and what it measured."""

    peer: Peer
    threads: int
    command: list[str]
    environment: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts the process and waits until its model is open; sets `missing` where there is none."""
        if not Path(self.command[0]).is_file():
            self.missing = f"no interpreter {self.command[0]}"
            return
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
        )
        answer = self._read()
        if answer["state"] == "missing":
            self.missing = answer["reason"]
            self.process.wait()
        else:
            self.info = answer["info"]

    def generate(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """One generation: tokens, first_token_s, decode_s, cpu_s (all threads, prompt included)."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "num_tokens": num_tokens}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if len(answer["tokens"]) != num_tokens:
            raise RuntimeError(f"{self.peer.name} made {len(answer['tokens'])} tokens; {num_tokens} were asked for")
        return answer

    def stop(self) -> None:
        """Ends the process; harmless where there is none."""
        if self.process is not None and self.process.poll() is None:
            self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.peer.name}, {self.threads} threads, ended with {code}; see its output above")
        return json.loads(line)


def peers_of(args: argparse.Namespace) -> list[Peer]:
    """All that can be measured, or those of --peers."""
    peers = [
        Peer(name="camshaft", python=sys.executable, script="run_camshaft.py", variant=args.target),
        Peer(name=REFERENCE, python=sys.executable, script="run_transformers.py"),
        Peer(name="onnxruntime-genai", python=args.genai_python, script="run_genai.py", variant="fp32"),
        Peer(name="llama.cpp", python=args.llamacpp_python, script="run_llamacpp.py", variant="f32/f32"),
        Peer(name="llama.cpp f16 cache", python=args.llamacpp_python, script="run_llamacpp.py", variant="f32/f16"),
        Peer(name="llama.cpp f16", python=args.llamacpp_python, script="run_llamacpp.py", variant="f16/f16"),
    ]
    names = [peer.name for peer in peers]
    wanted = args.peers.split(",") if args.peers else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise SystemExit(f"--peers {', '.join(unknown)}: unknown; allowed: {', '.join(names)}")
    return [peer for peer in peers if peer.name in wanted]


def make_workers(peers: list[Peer], threads: list[int], model: Path, work: Path) -> list[Worker]:
    """One worker per peer and number of threads, not started; converted models are kept by the checkpoint's digest."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")) + [model / "config.json"]:
        digest.update(path.read_bytes())
    folder = work / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    workers = []
    for peer in peers:
        for count in threads:
            command = [peer.python, str(PEERS_DIR / peer.script), "--model", str(model), "--work", str(folder)]
            command += ["--threads", str(count), "--variant", peer.variant]
            environment = {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
            workers.append(Worker(peer=peer, threads=count, command=command, environment=environment))
    return workers


def make_prompts(model: Path, length: int) -> list[list[int]]:
    """The first `length` token ids of each text, by the model's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids[:length] for text in TEXTS]
    short = min(map(len, prompts))
    if short < length:
        raise SystemExit(f"--prompt-tokens {length}: the shortest text has {short} tokens in this model's tokenizer")
    return prompts


def measure(workers: list[Worker], prompts: list[list[int]], args: argparse.Namespace) -> None:
    """Warms every worker up, then fills their `runs`: one prompt per repeat, the order of the workers rotating."""
    for worker in workers:
        worker.generate(prompts[-1][::-1], args.new_tokens)
    for repeat in range(args.repeats):
        shift = repeat % max(len(workers), 1)
        for worker in workers[shift:] + workers[:shift]:
            time.sleep(args.pause_s)  # thread pools spin for a while after their work
            index = repeat % len(prompts)
            run = worker.generate(prompts[index], args.new_tokens)
            run.update(prompt=index, load_average=os.getloadavg()[0])
            run["tokens_per_s"] = (args.new_tokens - 1) / run["decode_s"]
            worker.runs.append(run)
        print(f"repeat {repeat + 1} of {args.repeats}, load average {os.getloadavg()[0]:.2f}", file=sys.stderr)


def summary(worker: Worker, reference: Worker | None) -> dict[str, Any]:
    """A worker's numbers; agreement is with the reference's tokens for the same prompts."""
    entry: dict[str, Any] = {"peer": worker.peer.name, "threads": worker.threads, "command": " ".join(worker.command)}
    entry["environment"] = worker.environment
    if worker.missing is not None:
        return {**entry, "missing": worker.missing}
    rates = [run["tokens_per_s"] for run in worker.runs]
    median = statistics.median(rates)
    entry |= {
        "info": worker.info,
        "tokens_per_s": {"median": median, "min": min(rates), "max": max(rates)},
        "spread": (max(rates) - min(rates)) / median,
        "first_token_s": statistics.median(run["first_token_s"] for run in worker.runs),
        "cpu_s_per_token": statistics.median(run["cpu_s"] / len(run["tokens"]) for run in worker.runs),
        "runs": worker.runs,
    }
    if reference is not None and reference.missing is None:
        expected = {run["prompt"]: run["tokens"] for run in reference.runs}
        got = {run["prompt"]: run["tokens"] for run in worker.runs}
        first = {p: next((i for i, (a, b) in enumerate(zip(got[p], expected[p])) if a != b), None) for p in got}
        entry["agreement"] = {
            "prompts_equal": sum(place is None for place in first.values()),
            "prompts": len(first),
            "first_difference": first,
        }
    return entry


def table(entries: list[dict[str, Any]]) -> str:
    """The entries as Markdown."""
    lines = [
        "| peer | threads | decode tok/s, median | min to max | spread | CPU ms per token | first token, ms "
        "| greedy equals Transformers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        head = f"| {entry['peer']} | {entry['threads']} |"
        if "missing" in entry:
            lines.append(f"{head} missing: {entry['missing']} | | | | | |")
            continue
        rate, same = entry["tokens_per_s"], entry.get("agreement")
        agreement = f"{same['prompts_equal']} of {same['prompts']} prompts" if same else "not compared"
        lines.append(
            f"{head} {rate['median']:.0f} | {rate['min']:.0f} to {rate['max']:.0f} | {entry['spread']:.0%} | "
            f"{entry['cpu_s_per_token'] * 1e3:.2f} | {entry['first_token_s'] * 1e3:.1f} | {agreement} |"
        )
    return "\n".join(lines)


def cpu_name() -> str:
    """The CPU's name as the kernel gives it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a Hugging Face checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "camshaft" / "peers")
    parser.add_argument("--genai-python", default=sys.executable, help="interpreter that has onnxruntime-genai")
    parser.add_argument(
        "--llamacpp-python", default=sys.executable, help="interpreter that has llama-cpp-python and gguf"
    )
    parser.add_argument("--peers", default="", help="comma-separated names; default: all")
    parser.add_argument("--target", default="auto", help="Camshaft's compile target")
    parser.add_argument("--threads", default="1,2", help="comma-separated numbers of threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--pause-s", type=float, default=0.3, help="seconds between two measurements")
    args = parser.parse_args()
    if args.repeats < 1 or args.new_tokens < 2:
        parser.error("--repeats must be at least 1 and --new-tokens at least 2")
    args.model, args.work = args.model.resolve(), args.work.resolve()
    return args


def main() -> None:
    """Runs what was asked for, writes the JSON file and prints the table."""
    args = parse()
    prompts = make_prompts(args.model, args.prompt_tokens)
    workers = make_workers(peers_of(args), [int(part) for part in args.threads.split(",")], args.model, args.work)
    before = os.getloadavg()
    try:
        for worker in workers:
            worker.start()
            print(worker.peer.name, worker.threads, worker.missing or worker.info, file=sys.stderr)
        measure([worker for worker in workers if worker.missing is None], prompts, args)
    finally:
        for worker in workers:
            worker.stop()
    reference = next((worker for worker in workers if worker.peer.name == REFERENCE), None)
    entries = [summary(worker, reference) for worker in workers]
    result = {
        "command": " ".join([sys.executable, *sys.argv]),
        "cpu": {"model": cpu_name(), "cores": os.cpu_count(), "usable": len(os.sched_getaffinity(0))},
        "niceness": os.nice(0),
        "load_average": {"before": before, "after": os.getloadavg()},
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "prompts": prompts,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "peers": entries,
    }
    args.out.write_text(json.dumps(result, indent=1))
    print(table(entries))


if __name__ == "__main__":
    main()
