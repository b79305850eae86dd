"""`camshaft calibrate`: what a model's linear layers see on a text, in a file that later builds take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DeviceOption, DtypeOption, JsonOption, format_bytes, output, read_text

EXAMPLES = "Example: [bold]camshaft calibrate org/model --calibration text.txt -o model.safetensors[/]"


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face directory, hub id, or demo.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.safetensors", help="Where to write.", show_default=False)
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text, of the kind that the model will see; documents are separated by form feeds. The demo model has its own.",
            show_default=False,
        ),
    ] = None,
    moments: Annotated[
        bool, typer.Option("--moments/--no-moments", help="With second moments, which AWQ and GPTQ need.")
    ] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Collect calibration statistics once, for builds with --calibration FILE.safetensors."""
    from .. import api
    from .common import resolve_model

    with output(as_json) as to:
        text = None if calibration is None else read_text(calibration, "--calibration")
        given = model if model == "demo" else resolve_model(model)
        tokens = api.calibrate(given, out, text, moments=moments, device=device, dtype=dtype)
        size = out.stat().st_size
        to.document = {"file": str(out), "tokens": tokens, "bytes": size, "moments": moments}
        to.print(f"{out}: statistics of {tokens:,} tokens, {format_bytes(size)}")
