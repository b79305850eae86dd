"""What the commands share: consoles, --json, options of a build, tables. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..export.engine import Engine
    from ..export.manifest import BuildConfig
    from ..graph.program import PassRecord
    from ..runtime import SpeculativeConfig

# ------------------------------------------------------------------------------------------------------------- options
_BUILD = "Build"
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        rich_help_panel=_BUILD,
        help='What runs the model: "auto" (measured here), "onnxruntime" (CPU), "inductor" or "eager".',
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", rich_help_panel=_BUILD, help='"cpu" or "cuda"; default: the GPU where there is one.'),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        rich_help_panel=_BUILD,
        help='"float32", "bfloat16" or "float16"; default: bfloat16 on a GPU, float32 on a CPU.',
    ),
]
SeqLenOption = Annotated[
    int | None,
    typer.Option(
        "--max-seq-len",
        rich_help_panel=_BUILD,
        help="Most tokens of one sequence, prompt and output; default: the model's, at most 4096.",
    ),
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-batch-tokens",
        rich_help_panel=_BUILD,
        help="Most tokens in one step; default: 8192 on a GPU, 1024 on a CPU.",
    ),
]
SequencesOption = Annotated[
    int | None,
    typer.Option(
        "--max-sequences",
        rich_help_panel=_BUILD,
        help="Most sequences in one step; default: 256 on a GPU, 64 on a CPU.",
    ),
]
BlockSizeOption = Annotated[
    int | None,
    typer.Option("--block-size", rich_help_panel=_BUILD, help="Tokens in a block of the KV cache; default: 16."),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="RECIPE",
        rich_help_panel=_BUILD,
        help='How linear layers are quantized: "fp8", "int8", "int4", "int4_awq", "nvfp4" ... (docs/quantization.md lists them), '
        "or a recipe's JSON file; default: as the weights are.",
        show_default=False,
    ),
]
GroupOption = Annotated[
    int | None,
    typer.Option(
        "--group",
        metavar="N",
        rich_help_panel=_BUILD,
        help="Weights along a row that share a scale; default: what the recipe says.",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        rich_help_panel=_BUILD,
        help="Text to calibrate a recipe or an int8 KV cache with, of the kind that the model will see; documents are separated by "
        "form feeds. Or statistics that `camshaft calibrate` wrote. The demo model has its own text.",
        show_default=False,
    ),
]
KvDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        rich_help_panel=_BUILD,
        help='What keys and values are stored as: "auto" (as computed), "fp8" or "int8" (calibrated).',
        show_default=False,
    ),
]
BatchInvariantOption = Annotated[
    bool | None,
    typer.Option(
        "--batch-invariant",
        rich_help_panel=_BUILD,
        help="Results do not depend, to the last bit, on what else is in a step; needs a GPU.",
        show_default=False,
    ),
]
HiddenLayersOption = Annotated[
    str | None,
    typer.Option(
        "--hidden-layers",
        metavar="N,N,...",
        rich_help_panel=_BUILD,
        help="Hidden states that steps give, for proposers that read them: 0 the embeddings, N behind N layers, -1 behind the "
        "final norm.",
        show_default=False,
    ),
]
EarlyExitOption = Annotated[
    str | None,
    typer.Option(
        "--early-exit",
        metavar="N_OR_DIR",
        rich_help_panel=_BUILD,
        help="Layers in front of an exit that drafts (speculative method self), or the directory of a trained exit.",
        show_default=False,
    ),
]
BucketsOption = Annotated[
    str | None,
    typer.Option(
        "--buckets",
        metavar="N,N,...",
        rich_help_panel=_BUILD,
        help="Token counts to build TensorRT engines and capture CUDA graphs for. Default: 1, 2, 4 ... "
        "max-sequences ... max-batch-tokens.",
        show_default=False,
    ),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", rich_help_panel=_BUILD, help="Neither reuse an earlier build nor keep this one.")
]
KvBytesOption = Annotated[
    str | None,
    typer.Option("--kv-cache-bytes", help="Size of the KV cache, such as 512M or 2G; default: by the free memory."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help='Hugging Face directory, hub id (org/name), or "demo".', show_default=False),
]
EngineOrModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="ENGINE_OR_MODEL",
        help='An engine that `camshaft build` wrote; or a Hugging Face directory, a hub id or "demo", which is compiled first.',
        show_default=False,
    ),
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str | None, name: str) -> int | None:
    """ "512M" -> 536870912; K, M, G, T are powers of 1024, with or without B or iB. Raises ValueError naming the option."""
    if text is None:
        return None
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G", "T") else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except ValueError as error:
        raise ValueError(
            f"{name} is {text!r}; allowed: a number of bytes, or one with K, M, G or T, such as 512M"
        ) from error


def parse_layers(text: str | None) -> list[int] | None:
    """ "2,4,-1" -> [2, 4, -1]. Raises ValueError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.removeprefix("-").isdigit() for part in parts):
        raise ValueError(f"--hidden-layers is {text!r}; give numbers of layers, such as 2,4,-1")
    return [int(part) for part in parts]


def parse_exit(text: str | None) -> int | str | None:
    """A number of layers, or the directory of a trained exit ("demo-exit": that of the demo model)."""
    if text == "demo-exit":
        from ..models import demo

        return str(demo.exit_path())
    return int(text) if text is not None and text.isdigit() else text


def parse_numbers(text: str | None, name: str) -> list[int] | None:
    """ "1,8,64" -> [1, 8, 64]. Raises ValueError naming the option."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{name} is {text!r}; give numbers of tokens, such as 1,8,64")
    return [int(part) for part in parts]


# ------------------------------------------------------------------------------------------------------------- consoles
def _console(stderr: bool, quiet: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, quiet=quiet, width=None if stream.isatty() else 130)


def err() -> Console:
    """The console on stderr."""
    return _console(stderr=True)


class Output:
    """Where a command writes: `console` for people, `document` for --json (then the console is silent)."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = _console(stderr=False, quiet=as_json)
        self.document: dict[str, Any] = {}

    def print(self, text: str = "", style: str | None = None) -> None:
        """One line of plain text."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """An Output whose document is printed at the end if --json was given; stdout is stderr meanwhile."""
    made = Output(as_json)
    if not as_json:
        yield made
        return
    real = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield made
    finally:  # also where the command ends with exit code 1
        if made.document:
            real.write(json.dumps(made.document, indent=1, default=str) + "\n")
            real.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: Sequence[int] = (0,)) -> Table:
    """A plain table; columns whose index is in `left` are text, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.text import Text

    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        made.add_row(*[cell if isinstance(cell, Text) else Text(str(cell)) for cell in row])
    return made


def pass_table(passes: Sequence[PassRecord]) -> Table:
    """The passes that ran: matches, nodes, milliseconds, and the error where numerics were compared."""
    compared = any(record.max_error is not None for record in passes)
    columns = ["pass", "stage", "matches", "nodes", "ms", *(["max error"] if compared else [])]
    rows = []
    for record in passes:
        row: list[object] = [
            record.name,
            record.stage,
            record.num_matches,
            f"{record.nodes_before} -> {record.nodes_after}",
            f"{1e3 * record.seconds:.0f}",
        ]
        if compared:
            row.append("" if record.max_error is None else f"{record.max_error:.2g}")
        rows.append(row)
    return table("Passes", columns, rows, left=(0, 1))


def precision_text(build: BuildConfig) -> str:
    """What a build computes in: "bfloat16, fp8 linear layers, fp8 KV cache, batch-invariant, hidden states after layers 2, 4"."""
    parts = [build.dtype]
    if build.quantize is not None:
        from ..export.quantization import recipe_text

        parts.append(f"{recipe_text(build.quantize)} linear layers")
    if build.kv_cache_dtype != "auto":
        parts.append(f"{build.kv_cache_dtype} KV cache")
    if build.batch_invariant:
        parts.append("batch-invariant")
    if build.hidden_layers:
        from ..export.display import hidden_text

        parts.append(f"hidden states {hidden_text(build.hidden_layers)}")
    if build.early_exit is not None:
        from ..export.display import exit_text

        parts.append(f"early exit {exit_text(build)}")
    return ", ".join(parts)


def format_bytes(count: float) -> str:
    """ "1.50 MiB" """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


# -------------------------------------------------------------------------------------------------------- quantization
def quantize_options(quantize: str | None, group: int | None, calibration: Path | None) -> dict[str, Any]:
    """The keyword arguments of `camshaft.compile` for --quantize, --group and --calibration; None where one was not given.

    Raises ValueError for a file that cannot be read, or that is no recipe.
    """
    recipe: Any = quantize
    if quantize is not None and quantize.endswith(".json"):
        from ..passes.quantization.recipe import Recipe

        try:
            recipe = Recipe.from_json(json.loads(read_text(Path(quantize), "--quantize")))
        except json.JSONDecodeError as error:
            raise ValueError(f"--quantize {quantize} is not JSON ({error})") from error
    return {"quantize": recipe, "group": group, "calibration": read_calibration_file(calibration)}


def read_calibration_file(path: Path | None) -> str | Path | None:
    """The text of --calibration, or the path where it is a file of statistics. Raises ValueError for one that cannot be read."""
    if path is None or path.suffix == ".safetensors":
        return path
    return read_text(path, "--calibration")


def read_text(path: Path, option: str) -> str:
    """A file's text. Raises ValueError, naming the option, for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {path} cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------------------------- engines
def open_engine(
    model: str,
    build: Mapping[str, Any],
    *,
    progress: bool | None = None,
    speculative: SpeculativeConfig | None = None,
) -> Engine:
    """The engine of a directory that `camshaft build` wrote, or of a model, which is compiled with the given options.

    build: keyword arguments of `camshaft.compile`, None where an option was not given. speculative: how the engine is to speculate;
    a model is compiled with what that needs.
    """
    import camshaft

    given = {name: value for name, value in build.items() if value is not None}
    if (Path(model) / "manifest.json").is_file():
        limit = given.pop("max_sequences", None)
        given.pop("cache", None)
        if given:
            options = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(
                f"{model} is an engine, built already, so {options} cannot be changed; leave them out, or build it again"
            )
        return camshaft.load(model, max_sequences=limit)
    if speculative is not None:
        from ..runtime.speculative.build import target_options

        given = {**target_options(speculative, model), **given}
    engine: Engine = camshaft.compile(model, progress=progress, **given)
    return engine


def resolve_model(model: str) -> str:
    """The directory or hub id of a MODEL argument: "demo" is the bundled model."""
    if model != "demo":
        return model
    from ..models import demo

    return str(demo.path())


def engine_facts(engine: Engine) -> dict[str, Any]:
    """What a document says of an engine."""
    from dataclasses import asdict

    facts = engine.manifest.model
    return {
        "name": facts.name,
        "architecture": facts.architecture,
        "num_parameters": facts.num_parameters,
        **asdict(engine.config),
        "weights_bytes": engine.weights_bytes,
        "num_segments": len(engine.plan.segments),
        "report": list(engine.manifest.report),
    }
