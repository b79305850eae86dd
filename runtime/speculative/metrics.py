"""Counts of drafts and of what became of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SpeculativeMetrics:
    """Drafts and acceptance of a request, or of all requests of an LLM."""

    num_steps: int = 0
    """Steps that sampled tokens of a request; each request in a batch counts."""
    num_verifications: int = 0
    """How many of them verified drafts."""
    num_tokens: int = 0
    """Tokens that came out of these steps."""
    drafted: list[int] = field(default_factory=list)
    """Drafts verified at each position, the first being the one after the last known token."""
    accepted: list[int] = field(default_factory=list)
    """How many of them were accepted."""

    def count(self, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        """Counts one request in one step: `num_tokens` came out, `num_accepted` of `num_drafts` drafts among them."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        if not num_drafts:
            return
        self.num_verifications += 1
        missing = num_drafts - len(self.drafted)
        if missing > 0:
            self.drafted.extend([0] * missing)
            self.accepted.extend([0] * missing)
        for position in range(num_drafts):
            self.drafted[position] += 1
        for position in range(num_accepted):
            self.accepted[position] += 1

    def add(self, other: SpeculativeMetrics) -> None:
        """Adds the counts of others."""
        self.num_steps += other.num_steps
        self.num_verifications += other.num_verifications
        self.num_tokens += other.num_tokens
        for mine, theirs in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            mine.extend([0] * (len(theirs) - len(mine)))
            for position, number in enumerate(theirs):
                mine[position] += number

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the drafts verified at each position that were accepted."""
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
        """Tokens per step of a request, those without drafts counted; None before the first."""
        return self.num_tokens / self.num_steps if self.num_steps else None
