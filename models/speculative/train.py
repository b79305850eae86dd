"""Trains drafts for the demo model, each in a fixed amount of wall-clock time.

::

    python -m camshaft.models.speculative.train --method heads|eagle|exit|all --out OUT [--packed DIR] [--device cuda]
        [--minutes 1.5]

The target is frozen; its hidden states and distributions are computed as they are needed. Without `--packed` (token streams of
models/demo/tokenizer.py) the shipped calibration text is learnt from; either way half of the text is the target's own
continuations. Every method writes OUT/METHOD, a checkpoint in its published format, and all of them OUT/training.json with
accepted lengths on the target's greedy continuations of held-out prompts. On a CPU everything is smaller, to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..demo import path
from ..demo.optimizer import Muon
from .eagle import EagleDraft
from .estimate import estimate
from .exit import ExitHead
from .heads import HeadsConfig, MedusaHeads
from .objectives import EagleObjective, ExitObjective, HeadsObjective, Objective, Target
from .text import TrainingText, continuations, heldout_prompts, read_training_text

logger = logging.getLogger(__name__)

METHODS = ("heads", "eagle", "exit")
NUM_DRAFTS = 4
"""Drafts of the estimate."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of a run."""

    batch_tokens: int = 16_384
    context: int = 512
    """Tokens of a piece of training text: as many as of the target's own texts, so that all batches have one shape."""
    prompt: int = 96
    written: int = 416
    """Tokens that the target adds to a prompt of its own text."""
    rows: int = 6144
    """Texts of the target."""
    rows_at_once: int = 2048
    heldout: tuple[int, int, int] = (96, 200, 128)
    """Held-out prompts, their length, and the tokens that the target adds."""
    muon_lr: float = 0.015
    adam_lr: float = 0.002
    warmup: float = 0.02
    """Share of the time."""
    decay_from: float = 0.4
    """Share of the time at which the linear decay to zero begins."""
    num_heads: int = 4
    head_layers: int = 3
    draft_vocab: int = 3072
    capture: tuple[int, ...] = (2, 5, 8)
    """After how many of the target's layers EAGLE reads its hidden states."""
    exit_layer: int = 6
    exit_rank: int = 256

    def scale(self, progress: float) -> float:
        """The learning rates' factor at a share of the time in [0, 1]."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.05)
        return min(1.0, max(0.0, (1.0 - progress) / (1.0 - self.decay_from)))


SMALL = Settings(batch_tokens=512, context=128, prompt=64, written=64, rows=48, rows_at_once=16, heldout=(16, 64, 48))
"""For a CPU."""


def make_objective(method: str, target: Target, text: TrainingText, settings: Settings) -> Objective:
    """A network for the target, its parameters made from the target's where that is a beginning."""
    from transformers import LlamaConfig

    config: Any = target.model.config
    embedding = target.model.get_input_embeddings().weight
    if method == "heads":
        heads = MedusaHeads(
            HeadsConfig(num_heads=settings.num_heads, num_layers=settings.head_layers, hidden_size=config.hidden_size,
                        vocab_size=config.vocab_size, shared_head=True)
        ).to(embedding.device)  # fmt: skip
        with torch.no_grad():
            heads[0][-1].weight.copy_(target.model.get_output_embeddings().weight)  # type: ignore[index]
        return HeadsObjective(heads)
    if method == "exit":
        head = ExitHead(settings.exit_layer, config.hidden_size, settings.exit_rank, config.rms_norm_eps)
        with torch.no_grad():
            head.norm.weight.copy_(target.model.model.norm.weight)
        return ExitObjective(head.to(embedding.device), target.model.lm_head)
    make_config: Callable[..., Any] = LlamaConfig
    draft_config = make_config(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, head_dim=config.head_dim,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        num_hidden_layers=1, vocab_size=config.vocab_size, rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings, rope_theta=config.rope_parameters["rope_theta"],
        draft_vocab_size=settings.draft_vocab,
        eagle_config={"eagle_aux_hidden_state_layer_ids": list(settings.capture), "use_aux_hidden_state": True},
    )  # fmt: skip
    draft = EagleDraft(draft_config, len(settings.capture) * config.hidden_size).to(embedding.device)
    frequent = text.frequent(settings.draft_vocab, config.vocab_size)
    with torch.no_grad():  # at first it is its highest hidden state behind the target's norm
        draft.fc.weight.zero_()[:, -config.hidden_size :].fill_diagonal_(1.0)
        draft.midlayer.self_attn.o_proj.weight.zero_()
        draft.midlayer.mlp.down_proj.weight.zero_()
        draft.norm.weight.copy_(target.model.model.norm.weight)
        draft.embed_tokens.weight.copy_(embedding)
        draft.lm_head.weight.copy_(target.model.get_output_embeddings().weight[frequent])
        draft.d2t.copy_(frequent - torch.arange(settings.draft_vocab, device=frequent.device))
        draft.t2d[frequent] = True
    draft.embed_tokens.requires_grad_(False)
    return EagleObjective(draft, settings.capture)


class Optimizer:
    """Muon for the matrices inside, AdamW for vocabularies, norms and biases; on a CPU, where bf16 is slow, AdamW alone."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        inside = [p for p in trained if p.is_cuda and p.ndim == 2 and max(p.shape) < settings.draft_vocab]
        held = {id(p) for p in inside}
        self._muon = Muon(inside, lr=settings.muon_lr)
        self._adam = torch.optim.AdamW(
            [p for p in trained if id(p) not in held], lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._settings = settings

    def step(self, scale: float) -> None:
        """One update with the learning rates times `scale`; gradients are cleared."""
        self._muon.step(scale)
        for group in self._adam.param_groups:
            group["lr"] = self._settings.adam_lr * scale
        self._adam.step()
        for parameter in (*self._adam.param_groups[0]["params"], *(p for g in self._muon.groups for p in g)):
            parameter.grad = None


def train(
    objective: Objective,
    target: Target,
    text: TrainingText,
    settings: Settings,
    seconds: float,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """Runs steps for `seconds`; returns steps, tokens and the loss curve. Raises FloatingPointError if the loss is not finite.

    compiled: with torch.compile, whose time counts.
    """
    optimizer = Optimizer(objective.module, settings)
    on_gpu = text.stream.is_cuda
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
    loss_of = torch.compile(objective.loss) if compiled else objective.loss
    began, steps, tokens = time.perf_counter(), 0, 0
    pending: list[Tensor] = []
    curve: list[tuple[float, int, float]] = []
    while (progress := (time.perf_counter() - began) / seconds) < 1.0:
        rows = text.batch(settings.batch_tokens, settings.context)
        with autocast:
            loss = loss_of(target.features(rows, objective.layers))
        loss.backward()
        optimizer.step(settings.scale(progress))
        pending.append(loss.detach())
        steps, tokens = steps + 1, tokens + rows.numel()
        if steps % 10 == 0:
            mean = float(torch.stack(pending).mean())  # waits for the device, so the clock stays honest
            pending = []
            if not math.isfinite(mean):
                raise FloatingPointError(f"the training loss is {mean} at step {steps}: lower the learning rates")
            curve.append((round(time.perf_counter() - began, 2), tokens, round(mean, 4)))
            if steps % 100 == 0:
                logger.info("%6.1f s  step %5d  %6.1f M tokens  loss %.4f", curve[-1][0], steps, tokens / 1e6, mean)
    return {"steps": steps, "tokens": tokens, "seconds": round(time.perf_counter() - began, 1), "loss_curve": curve}


def write_text(target: Target, stream: Tensor, settings: Settings, device: torch.device) -> Tensor:
    """[rows, prompt + written] int64 continuations of pieces of the stream: half greedy, half at temperatures to 1."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(stream.numel() - settings.prompt, (settings.rows,), generator=generator)
    prompts = stream[starts[:, None] + torch.arange(settings.prompt)].to(device)
    temperatures = torch.linspace(-1, 1, settings.rows, device=device).clamp(min=0)
    order = torch.randperm(settings.rows, generator=generator).to(device)
    parts = [
        continuations(target.model, prompts[part], settings.written, temperatures[part])
        for part in order.split(settings.rows_at_once)
    ]
    return torch.cat(parts)


def run(
    methods: list[str],
    out: Path,
    packed: Path | None,
    device: torch.device,
    minutes: float,
    settings: Settings,
    *,
    compiled: bool = False,
) -> None:
    """Trains and estimates the methods one after another; `minutes` each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(path())
    target = Target(load(path(), dtype=torch.float32, attn_implementation="sdpa").to(device))
    began = time.perf_counter()
    stream = read_training_text(packed, tokenizer)
    text = TrainingText(stream, write_text(target, stream, settings, device), device)
    count, prompt, new = settings.heldout
    prompts = heldout_prompts(tokenizer, count, prompt).to(device)
    heldout = continuations(target.model, prompts, new, torch.zeros(count, device=device))
    logger.info("%d tokens of text and %d of the target's own after %.1f s", stream.numel(), text.written.numel(),
                time.perf_counter() - began)  # fmt: skip
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "text_tokens": stream.numel(),
        "written_tokens": text.written.numel(),
        "settings": asdict(settings),
    }
    for method in methods:
        objective = make_objective(method, target, text, settings)
        report[method] = train(objective, target, text, settings, 60 * minutes, compiled=compiled)
        length, shares = estimate(objective, target, heldout, prompt, NUM_DRAFTS)
        report[method] |= {
            "parameters": sum(p.numel() for p in objective.module.parameters() if p.requires_grad),
            "mean_accepted_length": round(length, 3),
            "acceptance_per_position": [round(share, 4) for share in shares],
        }
        objective.save(out / method)
        facts = {key: value for key, value in report[method].items() if key != "loss_curve"}
        logger.info("%s: %s", method, json.dumps(facts))
        (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=(*METHODS, "all"), default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--packed", type=Path, help="token streams to learn from; otherwise the shipped calibration text"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training for each method")
    parser.add_argument(
        "--compile", action="store_true", help="train with torch.compile: a minute more, then faster steps"
    )
    parser.add_argument("--exit-layer", type=int, default=Settings.exit_layer, help="exit: behind how many layers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(args.device)
    settings = replace(Settings() if device.type == "cuda" else SMALL, exit_layer=args.exit_layer)
    args.out.mkdir(parents=True, exist_ok=True)
    methods = list(METHODS) if args.method == "all" else [args.method]
    run(methods, args.out, args.packed, device, args.minutes, settings, compiled=args.compile)


if __name__ == "__main__":
    main()
