"""Options of speculative decoding, for `generate` and `bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..runtime import SpeculativeConfig, SpeculativeMetrics

_PANEL = "Speculative decoding"

SpeculativeOption = Annotated[
    str | None,
    typer.Option(
        "--speculative",
        metavar="METHOD",
        help="Draft tokens and verify several in a step: ngram (the text's own repetitions), draft (a smaller model), heads or "
        "eagle (small networks on the model's hidden states) or self (the model's first layers).",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
DraftModelOption = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        metavar="MODEL_OR_DIR",
        help="Of draft: an engine or a model with the same tokenizer; of heads, eagle and self: the directory of a checkpoint. "
        "demo-draft, demo-heads, demo-eagle and demo-exit go with demo.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
ExitLayerOption = Annotated[
    int | None,
    typer.Option(
        "--exit-layer",
        metavar="N",
        help="Of self: how many of the model's layers draft; an engine has been built with as many.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
NumDraftOption = Annotated[
    int, typer.Option("--num-draft-tokens", help="Most drafts for a request in a step.", rich_help_panel=_PANEL)
]
AcceptanceOption = Annotated[
    str,
    typer.Option(
        "--acceptance",
        help="Of drafts with temperature: rejection (the model's distribution), exact (the tokens of plain decoding) or typical.",
        rich_help_panel=_PANEL,
    ),
]
AdaptiveOption = Annotated[
    bool,
    typer.Option(
        "--adaptive/--no-adaptive",
        help="Draft as many tokens as measurements say pay, down to none; or always the most.",
        rich_help_panel=_PANEL,
    ),
]


def speculative_config(
    method: str | None,
    draft_model: str | None,
    exit_layer: int | None,
    num_draft_tokens: int,
    acceptance: str,
    adaptive: bool,
) -> SpeculativeConfig | None:
    """The config that the options make; None without --speculative. Raises ValueError for options that do not fit."""
    from ..runtime import SpeculativeConfig

    if method is None:
        if draft_model is not None:
            raise ValueError(f"--draft-model {draft_model} needs --speculative draft, heads, eagle or self")
        if exit_layer is not None:
            raise ValueError(f"--exit-layer {exit_layer} needs --speculative self")
        return None
    draft_model = _demo_path(draft_model)
    chosen: Any = {"method": method, "acceptance": acceptance, "exit_layer": exit_layer}
    return SpeculativeConfig(model=draft_model, num_draft_tokens=num_draft_tokens, adaptive=adaptive, **chosen)


def _demo_path(name: str | None) -> str | None:
    """Where a draft of the demo model is; any other name stays as it is."""
    from ..models import demo

    paths = {
        "demo-draft": demo.draft_path,
        "demo-heads": demo.heads_path,
        "demo-eagle": demo.eagle_path,
        "demo-exit": demo.exit_path,
    }
    found = paths.get(name or "")
    return name if found is None else str(found())


def acceptance_line(metrics: SpeculativeMetrics | None) -> str | None:
    """ "2.6 tokens per verification, accepted by position: 64 % 41 % 27 %", None where nothing was verified."""
    if metrics is None or not metrics.num_verifications:
        return None
    shares = " ".join(f"{share:.0%}" for share in metrics.acceptance_per_position)
    return f"{metrics.mean_accepted_length:.2f} tokens per verification; accepted by position: {shares}"


def metrics_facts(metrics: SpeculativeMetrics) -> dict[str, Any]:
    """What a document says of drafts and their acceptance."""
    return {
        "num_tokens": metrics.num_tokens,
        "num_verifications": metrics.num_verifications,
        "drafted": list(metrics.drafted),
        "accepted": list(metrics.accepted),
        "acceptance_per_position": metrics.acceptance_per_position,
        "mean_accepted_length": metrics.mean_accepted_length,
        "tokens_per_step": metrics.tokens_per_step,
    }
