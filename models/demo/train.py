"""Trains the demo model, then its draft by distillation, in a fixed amount of wall-clock time on one GPU.

::

    python -m camshaft.models.demo.train --packed .corpus/packed --out OUT --deadline-s 570

Both learning rates follow warm-up, constant, linear decay to zero over elapsed time, so that the run ends on time at
whatever speed the machine gives. The last quarter of the main model's time uses twice the context length.
``--tiny`` runs a few steps of everything on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .llama import DRAFT, MODEL, Llama, Shape, save
from .optimizer import Optimizer

logger = logging.getLogger(__name__)

END_OF_TEXT, USER = 0, 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run."""

    seconds: float
    """Wall-clock time of the run, its compilation and evaluations counted."""
    batch_tokens: int = 262_144
    contexts: tuple[tuple[float, int], ...] = ((0.75, 1024), (1.0, 2048))
    """(until this share of the time, context length), in order."""
    muon_lr: float = 0.02
    adam_lr: float = 0.006
    warmup: float = 0.01
    """Share of the time."""
    decay_from: float = 0.4
    """Share of the time at which the linear decay to zero begins."""
    chat_share: float = 0.12
    """Share of the sequences that come from the chat stream."""
    eval_every_s: float = 45.0
    max_steps: int = 10**9

    def scale(self, progress: float) -> float:
        """The learning rates' factor at a share of the time in [0, 1]."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.02)
        return min(1.0, max(0.0, (1.0 - progress) / (1.0 - self.decay_from)))


class Stream:
    """Batches of next-token sequences out of the packed token streams, kept on the device."""

    def __init__(self, folder: Path, device: torch.device, seed: int = 0) -> None:
        def load(name: str) -> Tensor:
            with lzma.open(folder / f"{name}.bin.xz") as file:
                raw = np.frombuffer(file.read(), dtype="<u2").astype(np.int16)
            return torch.from_numpy(raw).to(device)

        self.train, self.chat, self.heldout = load("train"), load("chat"), load("heldout")
        ends = (self.chat == END_OF_TEXT).nonzero().squeeze(1)
        self.chat_starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device
        self._starts = self._chat_order = torch.empty(0, dtype=torch.int64, device=device)
        self._context = 0
        self.epochs = 0.0

    def _shuffled(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator, device=self.device)

    def _next_train(self, count: int, context: int) -> Tensor:
        if context != self._context or self._starts.numel() < count:  # a new epoch, cut at another phase
            phase = int(torch.randint(context, (1,), generator=self.generator, device=self.device))
            number = (self.train.numel() - 1 - phase) // context
            self._starts = self._shuffled(number) * context + phase
            self._context = context
        chosen, self._starts = self._starts[:count], self._starts[count:]
        return chosen

    def _next_chat(self, count: int, context: int) -> Tensor:
        if self._chat_order.numel() < count:
            self._chat_order = self._shuffled(self.chat_starts.numel())
        chosen, self._chat_order = self._chat_order[:count], self._chat_order[count:]
        return self.chat_starts[chosen].clamp(max=self.chat.numel() - context - 1)

    def batch(self, count: int, context: int, chat_share: float) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 [count, context]."""
        chats = int(count * chat_share)
        span = torch.arange(context + 1, device=self.device)
        parts = [self.train[self._next_train(count - chats, context)[:, None] + span]]
        if chats:
            parts.append(self.chat[self._next_chat(chats, context)[:, None] + span])
        tokens = torch.cat(parts).long()
        self.epochs += (count - chats) * context / self.train.numel()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass
class Log:
    """What a run reports."""

    loss: list[tuple[float, int, float]] = field(default_factory=list)
    """(seconds, tokens, mean training loss since the last entry)"""
    heldout: list[tuple[float, int, float]] = field(default_factory=list)
    """(seconds, tokens, held-out loss, nats per token)"""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epochs: float = 0.0
    compile_seconds: float = 0.0


Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(model: Llama) -> Loss:
    """Mean next-token loss in nats."""

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits = model(inputs_BT).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())

    return loss


def distillation(student: Llama, teacher: Llama, share: float = 0.7) -> Loss:
    """``share`` of the divergence from the teacher's distribution (Hinton et al. 2015), the rest cross-entropy."""

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = functional.softmax(teacher(inputs_BT).float(), dim=-1)
        logp = functional.log_softmax(student(inputs_BT).float(), dim=-1)
        hard = functional.nll_loss(logp.flatten(0, 1), targets_BT.flatten())
        soft = -(wanted * logp).sum(-1).mean()
        return share * soft + (1 - share) * hard

    return loss


@torch.no_grad()
def heldout_loss(
    model: Loss, stream: Stream, autocast: Any, *, context: int, sequences: int, limit: int = 10**9
) -> float:
    """Mean loss over the held-out stream in nats per token, windows of ``context`` without overlap."""
    total, windows = 0.0, min((stream.heldout.numel() - 1) // context, limit)
    groups = max(windows // sequences, 1)
    for i in range(groups):
        starts = torch.arange(i * sequences, (i + 1) * sequences, device=stream.device).clamp(max=windows - 1) * context
        tokens = stream.heldout[starts[:, None] + torch.arange(context + 1, device=stream.device)].long()
        with autocast:
            total += float(model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return total / groups


def train(
    model: Llama,
    loss_of: Loss,
    plain_loss: Loss,
    stream: Stream,
    settings: Settings,
    *,
    compiled: bool,
    checkpoint: Callable[[], None],
) -> Log:
    """Runs the steps; returns the log. ``checkpoint`` is called at every evaluation."""
    device = stream.device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    log = Log()
    began = time.perf_counter()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    eval_loss = torch.compile(plain_loss, dynamic=False) if compiled else plain_loss
    eval_context = settings.contexts[0][1]
    eval_sequences = min(64 if compiled else 2, max(1, (stream.heldout.numel() - 1) // eval_context))
    optimizer = Optimizer(model, muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)
    for _, context in settings.contexts:  # compile everything before the clock starts
        for _ in range(2):
            inputs, targets = stream.batch(settings.batch_tokens // context, context, settings.chat_share)
            with autocast:
                step_loss(inputs, targets).backward()
            optimizer.step(0.0)
    heldout_loss(eval_loss, stream, autocast, context=eval_context, sequences=eval_sequences, limit=eval_sequences)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    optimizer = Optimizer(model, muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)
    stream.epochs = 0.0
    _synchronise(device)
    log.compile_seconds = time.perf_counter() - began
    logger.info("compiled and warmed up in %.1f s", log.compile_seconds)

    start = time.perf_counter()
    budget = settings.seconds - log.compile_seconds
    next_eval, pending = settings.eval_every_s, []
    while True:
        elapsed = time.perf_counter() - start
        progress = elapsed / budget
        if progress >= 1.0 or log.steps >= settings.max_steps:
            break
        context = next(c for until, c in settings.contexts if progress < until)
        inputs, targets = stream.batch(settings.batch_tokens // context, context, settings.chat_share)
        with autocast:
            loss = step_loss(inputs, targets)
        loss.backward()
        optimizer.step(settings.scale(progress))
        pending.append(loss.detach())
        log.steps += 1
        log.tokens += inputs.numel()
        if log.steps % 20 == 0:
            mean = float(torch.stack(pending).mean())  # waits for the device, so the clock stays honest
            pending = []
            if not math.isfinite(mean):
                raise FloatingPointError(f"the training loss is {mean} at step {log.steps}: lower the learning rates")
            log.loss.append((round(elapsed, 2), log.tokens, round(mean, 4)))
            if log.steps % 200 == 0:
                rate = log.tokens / (time.perf_counter() - start)
                logger.info(
                    "%6.1f s  step %d  %.0f M tokens  %.2f M tokens/s  loss %.4f",
                    elapsed,
                    log.steps,
                    log.tokens / 1e6,
                    rate / 1e6,
                    mean,
                )
        if elapsed > next_eval:
            next_eval += settings.eval_every_s
            value = heldout_loss(
                eval_loss, stream, autocast, context=eval_context, sequences=eval_sequences, limit=4 * eval_sequences
            )
            log.heldout.append((round(elapsed, 2), log.tokens, round(value, 4)))
            logger.info("%6.1f s  held-out loss %.4f", elapsed, value)
            checkpoint()
    _synchronise(device)
    log.seconds = time.perf_counter() - start
    log.epochs = stream.epochs
    value = heldout_loss(
        eval_loss, stream, autocast, context=eval_context, sequences=eval_sequences, limit=10**9 if compiled else 4
    )
    log.heldout.append((round(log.seconds, 2), log.tokens, round(value, 4)))
    logger.info(
        "done: %d steps, %.0f M tokens, %.2f epochs, %.1f s, held-out loss %.4f",
        log.steps,
        log.tokens / 1e6,
        log.epochs,
        log.seconds,
        value,
    )
    checkpoint()
    return log


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _report(shape: Shape, settings: Settings, log: Log, model: Llama, meta: dict[str, Any]) -> dict[str, Any]:
    heldout = log.heldout[-1][2]
    bytes_per_token = meta["heldout"]["bytes"] / meta["heldout"]["tokens"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": shape.__dict__,
        "settings": settings.__dict__,
        "steps": log.steps,
        "tokens": log.tokens,
        "epochs": round(log.epochs, 2),
        "seconds": round(log.seconds, 1),
        "compile_seconds": round(log.compile_seconds, 1),
        "tokens_per_s": round(log.tokens / max(log.seconds, 1e-9)),
        "heldout_loss": heldout,
        "heldout_perplexity": round(math.exp(heldout), 3),
        "heldout_bits_per_byte": round(heldout / math.log(2) / bytes_per_token, 4),
        "loss_curve": log.loss,
        "heldout_curve": log.heldout,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, default=Path(".corpus/packed"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline-s", type=float, default=570.0, help="the whole run ends before this, seconds")
    parser.add_argument("--draft-s", type=float, default=95.0, help="time kept for the draft, compilation included")
    parser.add_argument("--tiny", action="store_true", help="a few small steps, to try the script on a CPU")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    meta = json.loads((args.packed / "meta.json").read_text())
    stream = Stream(args.packed, device)
    logger.info("data ready after %.1f s: %s", time.perf_counter() - began, meta)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "data": meta,
    }
    tiny = {"batch_tokens": 512, "contexts": ((0.5, 64), (1.0, 128)), "max_steps": 25, "eval_every_s": 1e9}
    model = Llama(MODEL).to(device)
    margin = 10.0  # final evaluations and files
    main_settings = Settings(seconds=args.deadline_s - args.draft_s - 2 * margin - (time.perf_counter() - began))
    if args.tiny:
        main_settings = replace(main_settings, seconds=20.0, **tiny)  # type: ignore[arg-type]
    plain = cross_entropy(model)
    log = train(
        model,
        plain,
        plain,
        stream,
        main_settings,
        compiled=not args.tiny,
        checkpoint=lambda: save(model, args.out / "model"),
    )
    report["model"] = _report(MODEL, main_settings, log, model, meta)
    (args.out / "training.json").write_text(json.dumps(report, indent=1))

    draft = Llama(DRAFT).to(device)
    left = args.deadline_s - (time.perf_counter() - began) - margin
    draft_settings = Settings(seconds=left, contexts=((1.0, 1024),), eval_every_s=30.0)
    if args.tiny:
        draft_settings = replace(draft_settings, seconds=10.0, **tiny)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    log = train(
        draft,
        distillation(draft, model),
        cross_entropy(draft),
        stream,
        draft_settings,
        compiled=not args.tiny,
        checkpoint=lambda: save(draft, args.out / "draft"),
    )
    report["draft"] = _report(DRAFT, draft_settings, log, draft, meta)
    report["total_seconds"] = round(time.perf_counter() - began, 1)
    (args.out / "training.json").write_text(json.dumps(report, indent=1))
    logger.info("finished after %.1f s", time.perf_counter() - began)


if __name__ == "__main__":
    main()
