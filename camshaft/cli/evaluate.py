"""`camshaft eval`: quality, size and speed of a model's recipes, or of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    BatchTokensOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    EngineOrModelArgument,
    GroupOption,
    JsonOption,
    Output,
    SeqLenOption,
    SequencesOption,
    TargetOption,
    err,
    open_engine,
    output,
    read_calibration_file,
    read_text,
    table,
)

if TYPE_CHECKING:
    from ..runtime.evaluate.comparison import Comparison, Variant

EXAMPLES = (
    "Example: [bold]camshaft eval demo --recipes none,fp8,int8,int4_awq -o report.html[/]. More: docs/evaluation.md."
)


def evaluate(
    model: EngineOrModelArgument,
    recipes: Annotated[
        str | None,
        typer.Option(
            "--recipes",
            metavar="NAME,NAME,...",
            help='Recipes to build and compare with "none", the model as its weights are; recipes\' JSON files are taken too, and '
            '"+kv_fp8" behind a name stores keys and values in fp8. Default: none,fp8,int8,int4.',
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to score; documents are separated by form feeds. Default: for the demo model its own held-out text.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--tasks",
            metavar="FILE.jsonl",
            help='Items {"context", "choices", "answer"} or {"context", "continuation"}, one a line; may be given several times.',
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write a page (.html) or a document (.json); may be given several times.",
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", help="Tokens of a window of the text.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Use only so many tokens from the beginning of the text.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure output tokens per second, too.")] = True,
    batch: Annotated[int, typer.Option("--batch", help="Speed: requests at once.")] = 16,
    input_len: Annotated[int, typer.Option("--input-len", help="Speed: tokens of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", help="Speed: tokens generated for a prompt.")] = 64,
    repeats: Annotated[int, typer.Option("--repeat", help="Speed: timed runs, of which the median counts.")] = 3,
    engines: Annotated[
        Path | None,
        typer.Option("--engines", metavar="DIR", help="Keep the engines, each in a directory of its recipe's name."),
    ] = None,
    artifact: Annotated[
        bool, typer.Option("--artifact/--no-artifact", help="Save each engine for a moment, to know its size on disk.")
    ] = True,
    target: TargetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_seq_len: SeqLenOption = None,
    max_batch_tokens: BatchTokensOption = None,
    max_sequences: SequencesOption = None,
    group: GroupOption = None,
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a model's recipes: perplexity, divergence from the unquantized model, tasks, size and speed, in one table.

    Given an engine, its perplexity, tasks, size and speed are measured.
    """
    from ..runtime.evaluate.comparison import (
        DEFAULT,
        Comparison,
        Measurements,
        SpeedTest,
        Variant,
        parse_variants,
    )
    from ..runtime.evaluate.report import check_output
    from ..runtime.evaluate.tasks import read_task

    build = {
        "target": target, "device": device, "dtype": dtype, "max_seq_len": max_seq_len,
        "max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences,
    }  # fmt: skip
    with output(as_json) as to:
        for path in out or ():
            check_output(path)
        text = _default_text(text, model, bool(tasks))
        measurements = Measurements(
            text=None if text is None else read_text(text, "--text"),
            context=context,
            max_tokens=max_tokens,
            tasks=tuple(read_task(path) for path in tasks or ()),
            speed=SpeedTest(input_len=input_len, output_len=output_len, batch=batch, repeats=repeats)
            if speed
            else None,
            artifact=artifact,
        )
        if (Path(model) / "manifest.json").is_file():
            _check_engine_alone(model, {"--recipes": recipes, "--group": group, "--calibration": calibration})
            variants = [Variant(name=Path(model).name, options={})]
        else:
            data = read_calibration_file(calibration)
            names = list(DEFAULT) if recipes is None else [name.strip() for name in recipes.split(",")]
            variants = parse_variants(names, group=group, calibration=data, has_calibration=model == "demo")
        with Comparison(
            lambda options: open_engine(model, {**build, **options}), measurements, keep=engines, tell=_tell
        ) as compared:
            to.document = _run(compared, variants, text, context)
        _show(to, out or [])
        if to.document["failed"]:
            raise typer.Exit(1)


def _run(compared: Comparison, variants: list[Variant], text: Path | None, context: int) -> dict[str, Any]:
    """Measures all variants; the document. A recipe that cannot be built or run here does not cost the others their results."""
    from ..runtime.evaluate.report import make_document

    results = [compared.run(variants[0])]
    failed = []
    for variant in variants[1:]:
        try:
            results.append(compared.run(variant))
        except (ValueError, RuntimeError) as error:
            failed.append({"recipe": variant.name, "error": f"{type(error).__name__}: {error}"})
            _tell(f"{variant.name}: failed: {error}")
    facts: dict[str, Any] = {}
    if text is not None:
        facts["text"] = {"name": text.name, "num_tokens": results[0]["text"]["num_tokens"], "context": context}
    return make_document(model=compared.model, results=results, failed=failed, **facts)


def _show(to: Output, paths: list[Path]) -> None:
    from ..runtime.evaluate.report import result_table, write_report

    columns, rows = result_table(to.document, brief=True)
    to.console.print(table(to.document["model"]["name"], columns, rows))
    for entry in to.document["results"]:
        for line in entry["report"]:
            to.print(f"note: {entry['recipe']}: {line}", style="dim")
        for task in entry.get("tasks", ()):
            if task["num_truncated"]:
                to.print(
                    f"note: {entry['recipe']}: {task['num_truncated']} contexts of {task['name']} were cut off at the left"
                )
    for entry in to.document["failed"]:
        to.print(f"failed: {entry['recipe']}: {entry['error']}", style="bold red")
    for path in paths:
        write_report(to.document, path)
        to.print(f"written to {path}", style="bold")


def _default_text(text: Path | None, model: str, has_tasks: bool) -> Path | None:
    """The file to score. Raises ValueError where there would be nothing to measure quality by."""
    if text is not None or has_tasks:
        return text
    if model != "demo":
        raise ValueError("what shall be scored? Give --text FILE, --tasks FILE.jsonl, or both")
    from ..models import demo

    return demo.heldout_path()


def _check_engine_alone(model: str, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{model} is an engine, built already, so {', '.join(given)} cannot be changed; leave them out, or give the model"
        )


def _tell(line: str) -> None:
    """Says on stderr what is going on."""
    err().print(line, style="dim", markup=False, highlight=False)
