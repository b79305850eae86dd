"""`camshaft bench`: how fast is an engine, alone, in a full batch and under load; and documents of that, compared and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .common import (
    BatchInvariantOption,
    BatchTokensOption,
    BlockSizeOption,
    BucketsOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    GroupOption,
    JsonOption,
    KvBytesOption,
    KvDtypeOption,
    NoCacheOption,
    QuantizeOption,
    SeqLenOption,
    SequencesOption,
    TargetOption,
    err,
    output,
    parse_bytes,
    parse_numbers,
    quantize_options,
)
from .speculative import (
    AcceptanceOption,
    AdaptiveOption,
    DraftModelOption,
    ExitLayerOption,
    NumDraftOption,
    SpeculativeOption,
    speculative_config,
)

if TYPE_CHECKING:
    from ..runtime.bench.cases import Case

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
_MODE = "How they arrive"
_RUNS = "Runs"


@app.command(epilog=_EPILOG)
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[ENGINE_OR_MODEL]",
            help='An engine that `camshaft build` wrote; or a Hugging Face directory, a hub id or "demo", which is compiled '
            "first. Left out with --random-weights.",
            show_default=False,
        ),
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            "--random-weights",
            metavar="CONFIG",
            help="Compile this shape with random weights made on the device: a config.json, its directory, or a name such as "
            "llama-3.1-8b (a wrong name lists them).",
            show_default=False,
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            "--num-requests", help="Requests; default: 64, with --latency 4.", rich_help_panel=_LOAD, show_default=False
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
    seed: Annotated[
        int, typer.Option("--seed", help="Of lengths, tokens, arrivals and random weights.", rich_help_panel=_LOAD)
    ] = 0,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="One request at a time: milliseconds per token at batch size 1. Default: all at once.",
            rich_help_panel=_MODE,
        ),
    ] = False,
    load: Annotated[
        str | None,
        typer.Option(
            "--load",
            metavar="RATE[,RATE...]",
            help="At these rates, requests per second, by a Poisson process; inf: all at once. Measures TTFT, TPOT, ITL, E2E.",
            rich_help_panel=_MODE,
            show_default=False,
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            "--slo",
            metavar="NAME=MS",
            help="With --load: most ms of ttft, tpot or e2e; requests that meet all of them are goodput. May be repeated.",
            rich_help_panel=_MODE,
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(
            "--suite",
            metavar="FILE",
            help="Measure the cases of this JSON file on one engine; see docs/performance.md. --output is a directory then.",
            rich_help_panel=_RUNS,
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="When requests start: guaranteed_no_evict, max_utilization or static_batch.")
    ] = "guaranteed_no_evict",
    repeat: Annotated[
        int, typer.Option("--repeat", help="Timed runs; median and spread are printed.", rich_help_panel=_RUNS)
    ] = 3,
    warmup: Annotated[
        int, typer.Option("--warmup", help="Runs before them that do not count.", rich_help_panel=_RUNS)
    ] = 1,
    warmup_requests: Annotated[
        int | None,
        typer.Option(
            "--warmup-requests", help="Requests of such a run; default: all.", rich_help_panel=_RUNS, show_default=False
        ),
    ] = None,
    profile: Annotated[
        int,
        typer.Option(
            "--profile",
            metavar="STEPS",
            help="Profile this many steps in the middle of one more run: what the device does, and how long it waits.",
            rich_help_panel=_RUNS,
        ),
    ] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="With --profile: keep the Chrome trace there.",
            rich_help_panel=_RUNS,
            show_default=False,
        ),
    ] = None,
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
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="ENGINE",
            help="Also write the compiled engine there, before measuring.",
            show_default=False,
        ),
    ] = None,
    speculative: SpeculativeOption = None,
    draft_model: DraftModelOption = None,
    exit_layer: ExitLayerOption = None,
    num_draft_tokens: NumDraftOption = 4,
    acceptance: AcceptanceOption = "rejection",
    adaptive: AdaptiveOption = True,
    kv_cache_bytes: KvBytesOption = None,
    target: TargetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_seq_len: SeqLenOption = None,
    max_batch_tokens: BatchTokensOption = None,
    max_sequences: SequencesOption = None,
    block_size: BlockSizeOption = None,
    buckets: BucketsOption = None,
    quantize: QuantizeOption = None,
    group: GroupOption = None,
    calibration: CalibrationOption = None,
    kv_cache_dtype: KvDtypeOption = None,
    batch_invariant: BatchInvariantOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure throughput with many requests at once, latency of single ones (--latency), or both under load (--load).

    Prints output and total tokens per second, time to first token (TTFT), time per output token (TPOT) and between tokens
    (ITL), end to end (E2E), steps, batch size, prefix-cache hits and preemptions, as the median of the repeats and their
    range. Requests within the --slo limits per second are the goodput.
    """
    from .bench_run import Invocation

    if latency and load:
        raise ValueError("--latency is one request at a time and --load many at a rate; give one of the two")
    if trace is not None and not profile:
        raise ValueError("--trace keeps the trace of a profile; give --profile STEPS as well")
    if suite is None:
        cases = [
            _case(
                latency, load, slo or [], num_requests=num_requests, input_len=input_len, output_len=output_len,
                shared_prefix=shared_prefix, ignore_eos=ignore_eos, seed=seed, policy=policy, repeats=repeat,
                warmup=warmup, warmup_requests=warmup_requests, profile_steps=profile,
                kv_cache_bytes=parse_bytes(kv_cache_bytes, "--kv-cache-bytes"),
            )
        ]  # fmt: skip
    else:
        from ..runtime.bench.cases import read_suite

        cases = read_suite(suite)
    invocation = Invocation(
        model=model, random_weights=random_weights, seed=seed, cases=cases, is_suite=suite is not None, text=text,
        baseline=baseline, out=out, save=save, trace=trace,
        speculative=speculative_config(speculative, draft_model, exit_layer, num_draft_tokens, acceptance, adaptive),
        build={
            "target": target, "device": device, "dtype": dtype, "max_seq_len": max_seq_len,
            "max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences, "block_size": block_size,
            "buckets": parse_numbers(buckets, "--buckets"), "kv_cache_dtype": kv_cache_dtype,
            **quantize_options(quantize, group, calibration),
            "batch_invariant": batch_invariant, "cache": False if no_cache else None,
        },
    )  # fmt: skip
    with output(as_json) as to:
        invocation.run(to)


def _case(
    latency: bool,
    load: str | None,
    slo: list[str],
    *,
    num_requests: int | None,
    input_len: str,
    output_len: str,
    shared_prefix: int,
    ignore_eos: bool,
    seed: int,
    **rest: Any,
) -> Case:
    """The only case of a run without --suite."""
    from ..runtime.bench.cases import Case
    from ..runtime.bench.load import parse_rates, parse_slos
    from ..runtime.bench.workload import Workload, parse_range

    workload = Workload(
        num_requests=num_requests or (4 if latency else 64),
        input_len=parse_range(input_len, "--input-len"),
        output_len=parse_range(output_len, "--output-len"),
        shared_prefix=shared_prefix,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    return Case(
        mode="latency" if latency else "load" if load else "throughput",
        workload=workload,
        rates=parse_rates(load) if load else (),
        slos=parse_slos(slo),
        **rest,
    )


@app.command()
def compare(
    first: Annotated[
        Path,
        typer.Argument(metavar="A.json", help="Document that `camshaft bench --output` wrote.", show_default=False),
    ],
    others: Annotated[list[Path], typer.Argument(metavar="B.json...", help="More of them.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Compare benchmark documents with the first one: each metric's medians, their ratio, and whether the spreads overlap."""
    import dataclasses

    from ..runtime.bench.document import compare_documents, read_document, unlike
    from .bench_tables import comparison_table

    base = read_document(first)
    found = []
    for path in others:
        other = read_document(path)
        differences = compare_documents(base, other)
        if not differences:
            raise ValueError(
                f"{first} and {path} have no system, mode and rate in common; compare two runs of the same kind"
            )
        found.append((path, unlike(base, other), differences))
    with output(as_json) as to:
        to.document = {
            "first": str(first),
            "comparisons": [
                {"second": str(path), "conditions": lines, "differences": [dataclasses.asdict(d) for d in differences]}
                for path, lines, differences in found
            ],
        }
        for path, lines, differences in found:
            to.console.print(comparison_table(str(first), str(path), differences))
            for line in lines:
                to.print(f"not alike: {line}", style="yellow")


@app.command()
def report(
    documents: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT.json...", help="Documents that `camshaft bench --output` wrote.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Draw documents as one page of HTML: throughput, latency against load, memory, profiles of steps."""
    from ..runtime.bench.document import read_document
    from ..runtime.bench.report import report_html

    page = report_html([(path.stem, read_document(path)) for path in documents])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    err().print(f"written to {out}", style="dim", highlight=False)
