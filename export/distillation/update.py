"""One step of the training: from a batch of rows to new weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .captured import Captured
from .settings import DistillationSettings
from .student import ProgramModel


def feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the layers of the inputs' squared error, relative to their squares; float32 []."""
    ratios = [
        functional.mse_loss(x.float(), wanted.float(), reduction="sum")
        / torch.linalg.vector_norm(wanted.float()).square().clamp(min=1e-12)
        for x, wanted in zip(student, teacher, strict=True)
    ]
    return torch.stack(ratios).mean()


def divergence(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """Mean over R rows of KL(teacher || student), nats; logits of any float dtype."""
    wanted = torch.log_softmax(teacher_RV.float(), -1)
    return functional.kl_div(torch.log_softmax(student_RV.float(), -1), wanted, reduction="batchmean", log_target=True)


class Update:
    """Steps of AdamW on `trained`, the student's parameters that have gradients, in place. Batches have one shape."""

    def __init__(
        self,
        teacher: ProgramModel,
        student: ProgramModel,
        trained: Mapping[str, Tensor],
        settings: DistillationSettings,
        device: torch.device,
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._trained = list(trained.values())
        self._settings = settings
        self._watched = student.plan.layers.keys() if settings.features else ()
        self._optimizer = self._make_optimizer(device)
        self._batch = torch.empty(0)
        self._step = Captured("a step of the distillation", self._run, device, warmup=3)

    @property
    def replays(self) -> bool:
        """Whether steps are replayed from a CUDA graph by now."""
        return self._step.replays

    def __call__(self, batch: Tensor, rate: float) -> Tensor:
        """One step on rows [B, T] with this factor of the learning rate; its divergence [], without waiting for the device."""
        self._set_rate(self._settings.learning_rate * rate)
        if self._batch.shape == batch.shape:
            self._batch.copy_(batch)
        else:
            self._batch = batch.clone()
        return self._step().clone()

    def _run(self) -> Tensor:
        with torch.no_grad():
            wanted, wanted_inputs = self._teacher(self._batch, self._watched)
        logits, inputs = self._student(self._batch, self._watched)
        loss = divergence(logits, wanted)
        total = loss + self._settings.features * feature_error(inputs, wanted_inputs) if inputs else loss
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._settings.clip)
        self._optimizer.step()
        return loss.detach()

    def _make_optimizer(self, device: torch.device) -> torch.optim.AdamW:
        settings, captured = self._settings, device.type == "cuda"
        rate: float | Tensor = settings.learning_rate
        if captured:
            rate = torch.tensor(rate, device=device)  # where a graph reads it
        matrices = [parameter for parameter in self._trained if parameter.dim() > 1]
        vectors = [parameter for parameter in self._trained if parameter.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=rate, betas=(0.9, settings.beta2), capturable=captured
        )

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
