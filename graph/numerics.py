"""Numerics: two versions of a program run on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .program import Program


class Comparison:
    """Compares programs on one row of random tokens, with the program's own weights.

    Calling it with (before, after) returns the largest absolute difference of their outputs. A program's output is kept, so
    each version runs once. Weights are read for every run, one set at a time.
    """

    def __init__(self, program: Program, *, num_tokens: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = int(program.info.get("vocab_size", 32))
        self._inputs = {
            "token_ids": torch.randint(0, vocabulary, (1, num_tokens), generator=generator),
            "positions": torch.arange(num_tokens)[None],
        }
        for _, spec in program.placeholders("token"):
            if spec.dtype.is_floating_point:  # hidden states
                values = torch.randn((1, num_tokens, int(spec.shape[-1])), generator=generator)
                self._inputs[spec.name] = values.to(spec.dtype)
        self._last: tuple[Program, Tensor] | None = None

    def __call__(self, before: Program, after: Program) -> float:
        expected = self._last[1] if self._last is not None and self._last[0] is before else self.run(before)
        actual = self.run(after)
        self._last = (after, actual)
        return float((expected.float() - actual.float()).abs().max())

    def run(self, program: Program) -> Tensor:
        """The first output of a program that is not paged yet, on the CPU."""
        return run_program(program, self._inputs)[0]


def run_program(program: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Runs a program operator by operator; `inputs` are by name, weights come from its WeightMap."""
    arguments = []
    for _, spec in program.placeholders():
        if spec.kind == "weight":
            arguments.append(program.weights[spec.key].load().cpu())
        elif spec.name in inputs:
            arguments.append(inputs[spec.name])
        else:
            raise ValueError(f"{program.name} needs input {spec.name!r} ({spec.kind}); given: {', '.join(inputs)}")
    with torch.no_grad():
        return tuple(program.graph_module(*arguments))
