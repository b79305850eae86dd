"""The commands of `camshaft`, and how their errors become exit codes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from . import bench, bisect, build, calibrate, demo, distill, doctor, evaluate, export, generate, inspect
from .common import err

app = typer.Typer(
    name="camshaft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=build.EXAMPLES)(build.build)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command(epilog=distill.EXAMPLES)(distill.distill)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.add_typer(bench.app, name="bench")
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=bisect.EXAMPLES)(bisect.bisect)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"camshaft {__version__}")
        raise typer.Exit


@app.callback(epilog="Start here: [bold]camshaft demo[/]. If something does not work: [bold]camshaft doctor[/].")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, warnings and log messages (may stand anywhere).")
    ] = False,
) -> None:
    """Compiles PyTorch language models ahead of time into small engines, and serves them with in-flight batching.

    MODEL is a Hugging Face directory, a hub id such as org/name, or "demo" (a small model that comes with Camshaft).

    ENGINE is a directory that `camshaft build` wrote.
    """


def run(argv: Sequence[str]) -> int:
    """Runs a command line and returns its exit code: 0 well, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted."""
    arguments, debug = _take_debug(argv)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("torch", "transformers", "urllib3", "filelock", "matplotlib", "asyncio", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.INFO if debug else logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            app(args=arguments, prog_name="camshaft")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `camshaft ... | head`
        sys.stderr.close()
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if debug:
            raise
        text = str(error).strip() or type(error).__name__
        err().print(f"error: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


def _take_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there; what follows "--" is left alone."""
    arguments = list(argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    return [a for i, a in enumerate(arguments) if i >= end or a != "--debug"], debug
