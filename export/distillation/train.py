"""The training: AdamW on the divergence of the student's next-token distributions from the teacher's.

    loss = KL + features * F
    KL   mean over tokens of KL(teacher || student), nats                (Hinton et al. 2015, at temperature 1; LLM-QAT, 3.2)
    F    mean over rounded layers of |x - x_teacher|^2 / |x_teacher|^2, x what the layer reads     (Romero et al. 2015, FitNets)

F tells each layer what it should have made, and so learns from fewer tokens than KL alone, which is what counts in the end.
The weights with the least loss on the validation rows are kept; those that training began with count as the first. With one seed
the same machine gives the same weights, but for sums on a GPU whose order is not fixed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .captured import Captured
from .settings import DistillationSettings
from .student import ProgramModel
from .text import Rows
from .update import Update, divergence

logger = logging.getLogger(__name__)

StepProgress = Callable[[int, int, float], None]
"""(steps done, steps in all, the last mean loss)."""


@dataclass
class Outcome:
    """What a training did. divergence: nats per token on the validation rows, at first, and of the weights that were kept."""

    first_divergence: float
    divergence: float
    best_step: int
    """After which step those weights were; 0: training did not help."""
    seconds: float
    captured: bool = False
    """Whether steps were replayed from a CUDA graph."""
    history: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, mean training loss since the last entry, divergence on the validation rows)."""


def train(
    teacher: ProgramModel,
    student: ProgramModel,
    trained: Mapping[str, Tensor],
    rows: Rows,
    settings: DistillationSettings,
    device: torch.device,
    progress: StepProgress | None = None,
) -> Outcome:
    """Trains `trained`, the student's parameters that have gradients, in place; they end as the best that were seen.

    Raises RuntimeError, with the step, where the loss is NaN or infinite.
    """
    began = time.perf_counter()
    update = Update(teacher, student, trained, settings, device)
    search = Captured("the search for scales", student.search_scales, device, warmup=2)
    batch_rows = max(1, settings.batch_tokens // rows.train.shape[1])
    watch = _Validation(teacher, student, search, rows.validation.to(device), batch_rows)
    first = watch.measure()
    if not math.isfinite(first):
        raise RuntimeError(
            f"the divergence of the rounded model is {first} before training: a weight or the text's end is damaged"
        )
    outcome = Outcome(first, first, 0, 0.0, history=[(0, first, first)])
    best = _copy(trained)
    due = {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
    losses: list[Tensor] = []
    for step, batch in enumerate(rows.batches(batch_rows, settings.steps, settings.seed), start=1):
        if (step - 1) % settings.search_every == 0:
            search()
        losses.append(update(batch.to(device), settings.rate(step - 1)))
        if len(losses) % 10 == 0 or step in due:
            mean = _finite_mean(losses, step)
            if progress is not None:
                progress(step, settings.steps, mean)
        if step in due:
            found = watch.measure()
            outcome.history.append((step, _finite_mean(losses, step), found))
            logger.info("step %d: loss %.4f, validation %.4f nats per token", *outcome.history[-1])
            losses = []
            if found < outcome.divergence:
                outcome.divergence, outcome.best_step, best = found, step, _copy(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    outcome.captured, outcome.seconds = update.replays, time.perf_counter() - began
    return outcome


def _finite_mean(losses: list[Tensor], step: int) -> float:
    """The mean of the losses of the steps up to `step`. Raises RuntimeError that names the first that is not finite."""
    values = torch.stack(losses).tolist()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            at = step - len(values) + 1 + index
            raise RuntimeError(
                f"the distillation loss is {value} in step {at}: lower the learning rate, or compute in float32"
            )
    return sum(values) / len(values)


def _copy(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


@dataclass
class _Validation:
    """Measures the divergence on rows that are not learnt from, with scales as a build finds them."""

    teacher: ProgramModel
    student: ProgramModel
    search: Callable[[], None]
    rows: Tensor
    batch_rows: int

    @torch.no_grad()
    def measure(self) -> float:
        """Nats per token."""
        self.search()
        total = 0.0
        for batch in self.rows.split(self.batch_rows):
            total += float(divergence(self.student(batch)[0], self.teacher(batch)[0])) * batch.shape[0]
        return total / self.rows.shape[0]
