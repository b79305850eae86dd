"""What drafts may lose: a small share of the time, whatever it goes into. Imports no torch.

    a step without drafts     + SHARE
    a step with drafts        + steps without drafts that its tokens would have taken - those that fit into its time

all in steps without drafts of as many requests. Predictions of what pays are noisy, and the best of many noisy ones promises too
much; graphs are captured, a draft model catches up on what it has missed. The account counts what came of it. While it is empty
nobody is drafted for. So from a load where it does not pay, speculation takes no more than SHARE of the time, and MOST steps once.
"""

from __future__ import annotations

SHARE = 0.01
"""Of the time of steps without drafts, what may be spent on drafts that do not pay."""
MOST = 24.0
"""Steps without drafts that the account holds at first, and at most."""
MOST_LOST, MOST_LOST_FIRST = 3.0, 1.0
"""Steps without drafts that a single step is charged at most, and one of the first of its kind: what is compiled or captured in it
is so once."""


class DraftAccount:
    """Steps that drafts have gained and lost, and those that they still may lose."""

    def __init__(self) -> None:
        self.balance = MOST
        """Steps without drafts that drafts may still cost."""

    @property
    def allows(self) -> bool:
        """Whether drafts may be tried."""
        return self.balance > 0

    def rest(self) -> None:
        """Takes in a step without drafts."""
        self.balance = min(self.balance + SHARE, MOST)

    def draft(self, tokens_per_request: float, seconds: float, base_s: float, *, is_first: bool = False) -> None:
        """Takes in a step with drafts, or one that they were sought for in vain.

        Args:
            tokens_per_request: output tokens of the step, for each of its requests.
            seconds: what it took. base_s: what a step of the same requests takes without drafts.
            is_first: whether it is one of the first of its kind.
        """
        most_lost = MOST_LOST_FIRST if is_first else MOST_LOST
        self.balance = min(self.balance + max(tokens_per_request - seconds / base_s, -most_lost), MOST)
