"""Options of a distillation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """How the student is trained. Raises ValueError for numbers that are not allowed."""

    steps: int = 400
    """Updates of the weights."""
    batch_tokens: int = 8192
    """Tokens of a step."""
    context: int = 512
    """Tokens of a row; rows do not see each other."""
    learning_rate: float = 1e-4
    """AdamW's largest, for matrices and vectors alike."""
    features: float = 1.0
    """Weight of the second loss: how far the inputs of rounded layers are from the teacher's; 0: the distributions alone."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; a cosine takes it to zero after that."""
    beta2: float = 0.98
    """AdamW's second moment (its first: 0.9)."""
    weight_decay: float = 0.0
    """AdamW's, of matrices."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    sampled_tokens: int = 262_144
    """Tokens that the teacher writes itself, to learn from besides the text; 0: none."""
    prompt_tokens: int = 32
    """Tokens of the text that the teacher begins each of its own rows with."""
    temperature: float = 1.0
    """Of what the teacher writes."""
    validation: float = 0.06
    """Share of the text, and of what the teacher writes, that is not learnt from; the weights with the least divergence on it are
    kept."""
    validation_tokens: int = 16_384
    """Of that, tokens that are looked at, at most; the text's come first."""
    evaluations: int = 10
    """How often, at equal distances, the divergence on those is measured."""
    search_every: int = 4
    """Steps between searches for the weights' scales; evaluations always search."""
    seed: int = 0
    """Of batches and of what the teacher writes."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**7),
            ("batch_tokens", 2, 1 << 24),
            ("context", 2, 1 << 20),
            ("learning_rate", 1e-9, 1.0),
            ("features", 0.0, 1e6),
            ("warmup", 0.0, 0.9),
            ("beta2", 0.5, 0.99999),
            ("weight_decay", 0.0, 1.0),
            ("clip", 1e-6, 1e6),
            ("sampled_tokens", 0, 1 << 34),
            ("prompt_tokens", 1, 1 << 20),
            ("temperature", 0.0, 10.0),
            ("validation", 0.001, 0.5),
            ("validation_tokens", 2, 1 << 30),
            ("evaluations", 1, 10**6),
            ("search_every", 1, 10**6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"distillation: {name} is {value}; allowed: {low:g} to {high:g}")
        if self.prompt_tokens >= self.context:
            raise ValueError(
                f"distillation: prompt_tokens is {self.prompt_tokens} and context {self.context}; a prompt must leave room for "
                "what the model writes"
            )

    @classmethod
    def of(cls, **given: float | int | None) -> DistillationSettings:
        """The defaults with what is given and not None. Raises ValueError for an unknown name."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"distillation: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def rate(self, step: int) -> float:
        """The learning rate's factor in step 0, 1 ...: a linear rise, then half a cosine to zero (Loshchilov and Hutter 2017)."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        progress = (step - rising) / max(self.steps - rising, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))
