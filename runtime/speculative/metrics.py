"""Counts of drafts and of what became of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SpeculativeMetrics:
    """Drafts and acceptance of a request (over all its samples), or of all requests of an LLM."""

    num_tokens: int = 0
    """Output tokens of requests that have ended."""
    num_verifications: int = 0
    """Times that a step verified drafts of a request."""
    num_verified_tokens: int = 0
    """Output tokens that came of these."""
    drafted: list[int] = field(default_factory=list)
    """Drafts verified at each position, the first being the one after the last known token."""
    accepted: list[int] = field(default_factory=list)
    """How many of them were accepted."""

    def count(self, num_drafts: int, num_accepted: int, num_tokens: int, times: int = 1) -> None:
        """Counts one verification of a request: `num_tokens` came out, `num_accepted` of `num_drafts` drafts among them.

        times: how many verifications came out like this.
        """
        self.num_verifications += times
        self.num_verified_tokens += times * num_tokens
        missing = num_drafts - len(self.drafted)
        if missing > 0:
            self.drafted.extend([0] * missing)
            self.accepted.extend([0] * missing)
        for position in range(num_drafts):
            self.drafted[position] += times
        for position in range(num_accepted):
            self.accepted[position] += times

    def copy(self) -> SpeculativeMetrics:
        """The counts as of now."""
        return SpeculativeMetrics(
            self.num_tokens, self.num_verifications, self.num_verified_tokens, list(self.drafted), list(self.accepted)
        )

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the drafts verified at each position that were accepted; for a tree, positions are depths."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted)]

    @property
    def acceptance_rate(self) -> float | None:
        """Share of all verified drafts that were accepted; None without drafts."""
        return sum(self.accepted) / sum(self.drafted) if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per verification: the accepted drafts and the one that the target adds; None without drafts."""
        return 1 + sum(self.accepted) / self.num_verifications if self.num_verifications else None

    @property
    def tokens_per_step(self) -> float | None:
        """Output tokens per step of a request, steps without drafts counted; None before a request has ended."""
        num_steps = self.num_tokens - self.num_verified_tokens + self.num_verifications
        return self.num_tokens / num_steps if self.num_tokens and num_steps else None
