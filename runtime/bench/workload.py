"""The requests of a benchmark: lengths and token ids, drawn from a seed. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]
"""Smallest and largest value, both included."""


def parse_range(text: str, name: str) -> Range:
    """ "128" -> (128, 128), "16:256" -> (16, 256). Raises ValueError naming the option."""
    parts = text.split(":")
    try:
        low, high = int(parts[0]), int(parts[-1])
    except ValueError:
        low, high = 0, -1
    if len(parts) > 2 or not 1 <= low <= high:
        raise ValueError(f"{name} is {text!r}; allowed: a number of tokens such as 128, or a range such as 16:256")
    return low, high


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a system: `num_requests` prompts with a fixed number of output tokens each.

    Lengths are uniform in their ranges and equal in all repeats; the tokens differ from repeat to repeat, so that no
    repeat finds its prompts in a prefix cache that another has filled.
    """

    num_requests: int = 64
    """Requests, >= 1; all arrive at once."""
    input_len: Range = (32, 256)
    """Tokens of a prompt, the shared prefix included."""
    output_len: Range = (32, 128)
    """Tokens generated for a prompt."""
    shared_prefix: int = 0
    """Tokens at the beginning that all prompts have in common."""
    ignore_eos: bool = True
    """Whether generation goes on past the model's end-of-text token, so that every request has its full length."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"num_requests is {self.num_requests}; allowed: integers >= 1")
        if not 0 <= self.shared_prefix < self.input_len[0]:
            raise ValueError(
                f"shared_prefix is {self.shared_prefix}; allowed: 0 to {self.input_len[0] - 1}, less than the shortest prompt"
            )

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of every request."""
        draw = random.Random(f"lengths {self.seed}")
        return [(draw.randint(*self.input_len), draw.randint(*self.output_len)) for _ in range(self.num_requests)]

    def check_fits(self, max_seq_len: int) -> None:
        """Raises ValueError if a request is longer than the model or engine takes."""
        longest = self.input_len[1] + self.output_len[1]
        if longest > max_seq_len:
            raise ValueError(
                f"the longest request has {self.input_len[1]} + {self.output_len[1]} = {longest} tokens, but sequences end at "
                f"{max_seq_len}; lower --input-len or --output-len, or build with a larger --max-seq-len"
            )


@dataclass(frozen=True)
class BenchRequest:
    """One request: the prompt's token ids, and how many tokens to generate."""

    prompt: list[int]
    output_len: int


def make_requests(
    workload: Workload, repeat: int, *, vocab_size: int, text_tokens: Sequence[int] | None = None, salt: str = ""
) -> list[BenchRequest]:
    """The requests of one repeat: random token ids, or pieces of a text's tokens from random places.

    salt: other tokens for another one, where several workloads share a prefix cache.
    Raises ValueError if the text is shorter than the longest prompt.
    """
    draw = random.Random(f"tokens {workload.seed} {repeat}{salt}")
    if text_tokens is not None and len(text_tokens) < workload.input_len[1]:
        raise ValueError(
            f"the text has {len(text_tokens)} tokens, fewer than the longest prompt ({workload.input_len[1]}); "
            "give a longer text or a smaller --input-len"
        )

    def tokens(count: int) -> list[int]:
        if text_tokens is None:
            return [draw.randrange(vocab_size) for _ in range(count)]
        start = draw.randint(0, len(text_tokens) - count)
        return list(text_tokens[start : start + count])

    prefix = tokens(workload.shared_prefix)
    return [
        BenchRequest(prefix + tokens(num_input - len(prefix)), num_output)
        for num_input, num_output in workload.lengths()
    ]
