"""`camshaft distill`: weights that are tuned for a recipe, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DeviceOption,
    DtypeOption,
    GroupOption,
    JsonOption,
    ModelArgument,
    output,
    quantize_options,
    read_text,
)

EXAMPLES = (
    "Example: [bold]camshaft distill demo --quantize nvfp4 -o tuned[/], then "
    "[bold]camshaft build tuned --quantize nvfp4 -o engine[/]"
)


def distill(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Where to write; new or empty.", show_default=False),
    ],
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="RECIPE",
            help='What the weights are tuned for: "nvfp4", "int4", "w4a8", "fp8" ... (recipes without calibration), or a '
            "recipe's JSON file.",
            show_default=False,
        ),
    ] = None,
    group: GroupOption = None,
    kv_cache_dtype: Annotated[
        str,
        typer.Option("--kv-cache-dtype", metavar="DTYPE", help='"auto", or "fp8": keys and values are rounded, too.'),
    ] = "auto",
    center_keys: Annotated[
        bool,
        typer.Option("--center-keys", help="The build will have --calibration: its fp8 keys lose their mean."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text to learn from, of the kind that the model will see; documents are separated by form feeds. Default: the "
            "demo model's own; other models write what they learn from.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Updates; default: 400.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="The largest; default: 1e-4.", show_default=False)
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Tokens of a step; default: 8192.", show_default=False)
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a row; default: 512.", show_default=False)
    ] = None,
    sampled_tokens: Annotated[
        int | None,
        typer.Option("--sampled-tokens", help="Tokens that the model writes to learn from.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of batches and of sampling.", show_default=False)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune a model's weights so that a recipe's rounding costs it little (quantization-aware distillation)."""
    from .. import api
    from .common import resolve_model

    with output(as_json) as to:
        recipe = quantize_options(quantize, group, None)["quantize"]
        found = api.distill(
            model if model == "demo" else resolve_model(model),
            out,
            quantize=recipe,
            group=group,
            kv_cache_dtype=kv_cache_dtype,
            center_keys=center_keys,
            data=None if data is None else read_text(data, "--data"),
            device=device,
            dtype=dtype,
            steps=steps,
            learning_rate=learning_rate,
            batch_tokens=batch_tokens,
            context=context,
            sampled_tokens=sampled_tokens,
            seed=seed,
        )
        to.document = {
            "output": str(out),
            "divergence_before": found.divergence_before,
            "divergence": found.divergence,
            "best_step": found.best_step,
            "steps": found.steps,
            "train_tokens": found.train_tokens,
            "seconds": round(found.seconds, 1),
            "report": list(found.report),
        }
        for line in found.report:
            to.print(line)
        to.print(
            f"{out}: divergence from the unquantized model {found.divergence_before:.4f} nats per token before, "
            f"{found.divergence:.4f} after step {found.best_step} of {found.steps} ({found.seconds:.0f} s)"
        )
