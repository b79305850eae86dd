"""`camshaft bench`: how fast is an engine, and how fast is Transformers on the same requests?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .common import (
    BatchInvariantOption,
    BatchTokensOption,
    BlockSizeOption,
    DeviceOption,
    DtypeOption,
    EngineOrModelArgument,
    JsonOption,
    KvBytesOption,
    KvDtypeOption,
    Output,
    QuantizeOption,
    SeqLenOption,
    SequencesOption,
    TargetOption,
    engine_facts,
    err,
    open_engine,
    output,
    parse_bytes,
    resolve_model,
    table,
)

if TYPE_CHECKING:
    from ..export.engine import Engine
    from ..runtime.bench.measure import Repeat
    from ..runtime.bench.workload import BenchRequest, Workload

_EPILOG = "Example: [bold]camshaft bench demo --baseline transformers --output bench.json[/]"


class _DefaultRun(TyperGroup):
    """`camshaft bench MODEL ...` is `camshaft bench run MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultRun,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure speed: [bold]camshaft bench MODEL[/] (its options: camshaft bench run --help).",
    epilog=_EPILOG,
)
_LOAD = "Requests"


@app.command(epilog=_EPILOG)
def run(
    model: EngineOrModelArgument,
    num_requests: Annotated[
        int | None,
        typer.Option(
            "--num-requests",
            help="Requests, all arriving at once; default: 64, with --latency 4.",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    input_len: Annotated[
        str,
        typer.Option(
            "--input-len",
            metavar="A[:B]",
            help="Tokens of a prompt: a number, or a range to draw from.",
            rich_help_panel=_LOAD,
        ),
    ] = "32:256",
    output_len: Annotated[
        str, typer.Option("--output-len", metavar="A[:B]", help="Tokens to generate for each.", rich_help_panel=_LOAD)
    ] = "32:128",
    shared_prefix: Annotated[
        int,
        typer.Option("--shared-prefix", help="Tokens at the beginning that all prompts share.", rich_help_panel=_LOAD),
    ] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Take prompts from this text instead of random tokens.",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--stop-at-eos",
            help="Go on past the end of the text, so that every request has its full length.",
            rich_help_panel=_LOAD,
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of lengths and tokens.", rich_help_panel=_LOAD)] = 0,
    latency: Annotated[
        bool, typer.Option("--latency", help="One request at a time: milliseconds per token at batch size 1.")
    ] = False,
    policy: Annotated[
        str, typer.Option("--policy", help="When requests start: guaranteed_no_evict, max_utilization or static_batch.")
    ] = "guaranteed_no_evict",
    repeat: Annotated[int, typer.Option("--repeat", help="Timed runs; median and spread are printed.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", help="Runs before them that do not count.")] = 1,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="transformers",
            help="Also measure Transformers' generate on the same requests (needs a model, not an engine).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the JSON document there.", show_default=False)
    ] = None,
    kv_cache_bytes: KvBytesOption = None,
    target: TargetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_seq_len: SeqLenOption = None,
    max_batch_tokens: BatchTokensOption = None,
    max_sequences: SequencesOption = None,
    block_size: BlockSizeOption = None,
    quantize: QuantizeOption = None,
    kv_cache_dtype: KvDtypeOption = None,
    batch_invariant: BatchInvariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure throughput with many requests at once, or (--latency) the time of single ones.

    Prints output and total tokens per second, time to first token (TTFT), time per output token (TPOT) and between tokens
    (ITL), steps, batch size, prefix-cache hits and preemptions, as the median of the repeats and their range.
    """
    from ..runtime.bench.workload import Workload, parse_range

    if baseline not in (None, "transformers"):
        raise ValueError(f"--baseline is {baseline!r}; allowed: transformers")
    if baseline and (Path(model) / "manifest.json").is_file():
        raise ValueError(
            f"{model} is an engine, and Transformers needs the model: give its Hugging Face directory (or demo)"
        )
    workload = Workload(
        num_requests=num_requests or (4 if latency else 64),
        input_len=parse_range(input_len, "--input-len"),
        output_len=parse_range(output_len, "--output-len"),
        shared_prefix=shared_prefix,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    build = {
        "target": target,
        "device": device,
        "dtype": dtype,
        "max_seq_len": max_seq_len,
        "max_batch_tokens": max_batch_tokens,
        "max_sequences": max_sequences,
        "block_size": block_size,
        "quantize": quantize,
        "kv_cache_dtype": kv_cache_dtype,
        "batch_invariant": batch_invariant,
    }
    with output(as_json) as to:
        engine = open_engine(model, build)
        bench = _Bench(engine, workload, repeat, warmup, latency, text)
        results = [bench.measure_llm(policy, parse_bytes(kv_cache_bytes, "--kv-cache-bytes"))]
        if baseline:
            results.extend(bench.measure_transformers(resolve_model(model)))
        _finish(to, engine, workload, results, out)


class _Bench:
    """One invocation: the engine, its requests, and the systems that are measured on them."""

    def __init__(
        self, engine: Engine, workload: Workload, repeats: int, warmup: int, latency: bool, text: Path | None
    ) -> None:
        workload.check_fits(engine.max_seq_len)
        self.engine, self.workload = engine, workload
        self.repeats, self.warmup, self.latency = repeats, warmup, latency
        self.text_tokens = _text_tokens(engine, text)

    def requests(self, repeat: int) -> list[BenchRequest]:
        """The requests of a repeat, equal for all systems."""
        from ..runtime.bench.workload import make_requests

        return make_requests(self.workload, repeat, vocab_size=self.engine.vocab_size, text_tokens=self.text_tokens)

    def measure_llm(self, policy: str, kv_cache_bytes: int | None) -> dict[str, Any]:
        """Camshaft's part of the document."""
        from ..runtime import LLM
        from ..runtime.bench.document import result_entry
        from ..runtime.bench.measure import RecordingEngine, repeat_runs, run_latency, run_throughput

        recording = RecordingEngine(self.engine)
        measure = run_latency if self.latency else run_throughput
        with LLM(recording, policy=policy, kv_cache_bytes=kv_cache_bytes) as llm:
            runs = repeat_runs(
                lambda index: measure(llm, recording, self.requests(index), ignore_eos=self.workload.ignore_eos),
                repeats=self.repeats,
                warmup=self.warmup,
                on_run=lambda index, metrics: _tell("camshaft", index, metrics),
            )
            memory = dict(llm.memory.rows())
        return result_entry("camshaft", self._mode, runs, policy=policy, memory_bytes=memory)

    def measure_transformers(self, path: str) -> list[dict[str, Any]]:
        """Transformers' parts of the document, on the same requests."""
        from transformers.utils import logging as transformers_logging

        from ..runtime.bench.document import result_entry
        from ..runtime.bench.peer import TransformersPeer, run_peer

        transformers_logging.disable_progress_bar()
        config = self.engine.config
        peer = TransformersPeer(path, dtype=config.dtype, device=config.device, ignore_eos=self.workload.ignore_eos)
        if self.latency:
            for _ in range(self.warmup):
                peer.latency(self.requests(-1)[:1])
            runs = []
            for index in range(self.repeats):
                runs.append(peer.latency(self.requests(index)))
                _tell("transformers", index, runs[-1])
            return [result_entry("transformers, one by one", "latency", runs, batch_size=1)]
        measured = run_peer(peer, self.requests, repeats=self.repeats, warmup=self.warmup, on_run=_tell)
        return [result_entry(name, "throughput", runs, batch_size=size) for name, size, runs in measured]

    @property
    def _mode(self) -> str:
        return "latency" if self.latency else "throughput"


def _text_tokens(engine: Engine, text: Path | None) -> list[int] | None:
    if text is None:
        return None
    from ..runtime.tokenizer import Tokenizer

    if engine.tokenizer_path is None:
        raise ValueError("--text needs a tokenizer and this engine has none; leave it out for random tokens")
    return Tokenizer.from_dir(engine.tokenizer_path).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)


def _tell(system: str, index: int, metrics: Repeat) -> None:
    err().print(
        f"{system}, run {index + 1}: {metrics['output_tok_s']:.1f} output tokens/s", style="dim", highlight=False
    )


_SHOWN = {
    "output_tok_s": "output tokens/s",
    "total_tok_s": "total tokens/s",
    "decode_ms_p50": "decode, ms per token",
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p99": "TTFT p99, ms",
    "tpot_ms_p50": "TPOT p50, ms",
    "tpot_ms_p99": "TPOT p99, ms",
    "itl_ms_p50": "ITL p50, ms",
    "itl_ms_p99": "ITL p99, ms",
    "request_s": "request, s",
    "duration_s": "duration, s",
    "steps": "steps",
    "mean_batch_size": "sequences per step",
    "prefix_hit_tokens": "prefix-cache hits, tokens",
    "preemptions": "preemptions",
}


def _finish(
    to: Output, engine: Engine, workload: Workload, results: Sequence[dict[str, Any]], out: Path | None
) -> None:
    from ..runtime.bench.document import make_document

    to.document = make_document(model=engine_facts(engine), workload=workload, results=results)
    rows = []
    for metric, label in _SHOWN.items():
        if any(metric in result["summary"] for result in results):
            rows.append([label, *(_cell(result["summary"].get(metric)) for result in results)])
    facts, config = engine.manifest.model, engine.config
    title = (
        f"{facts.name}, {config.target} on {config.device}, {config.dtype}: {workload.num_requests} requests "
        f"of {_span(workload.input_len)} + {_span(workload.output_len)} tokens, median (min - max) of {len(results[0]['repeats'])}"
    )
    to.console.print(table(title, ["", *(result["system"] for result in results)], rows))
    if len(results) > 1:
        best = max(results[1:], key=lambda result: result["summary"]["output_tok_s"]["median"])
        ratio = results[0]["summary"]["output_tok_s"]["median"] / best["summary"]["output_tok_s"]["median"]
        to.print(f"camshaft: {ratio:.2f} times the output tokens/s of {best['system']}", style="bold")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(to.document, indent=1) + "\n")
        err().print(f"written to {out}", style="dim", highlight=False)


def _span(span: tuple[int, int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def _cell(summary: dict[str, float] | None) -> str:
    if summary is None:
        return "-"
    low, high = summary["min"], summary["max"]
    spread = "" if low == high else f" ({_number(low)} - {_number(high)})"
    return _number(summary["median"]) + spread


@app.command()
def compare(
    first: Annotated[
        Path,
        typer.Argument(metavar="A.json", help="Document that `camshaft bench --output` wrote.", show_default=False),
    ],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Compare two benchmark documents: each metric's medians, their ratio, and whether the spreads overlap."""
    import dataclasses

    from ..runtime.bench.document import compare_documents, read_document, unlike

    one, two = read_document(first), read_document(second)
    differences = compare_documents(one, two)
    if not differences:
        raise ValueError(f"{first} and {second} have no system and mode in common; compare two runs of the same kind")
    with output(as_json) as to:
        to.document = {"conditions": unlike(one, two), "differences": [dataclasses.asdict(d) for d in differences]}
        rows = [
            [d.system, _SHOWN[d.metric], _cell(d.first), _cell(d.second), f"{d.ratio:.2f}x", d.verdict]
            for d in differences
            if d.metric in _SHOWN
        ]
        columns = ["system", "metric", first.name, second.name, "ratio", "second is"]
        to.console.print(table(f"{first} and {second}", columns, rows, left=(0, 1, 5)))
        for line in to.document["conditions"]:
            to.print(f"not alike: {line}", style="yellow")
