"""Where the serving thread's time goes. Imports no torch.

in turns         | schedule | launch | wait | deliver |
asynchronous     | schedule | launch | wait for the step before | deliver it |
with drafts      | wait for the step before | propose | schedule | launch | deliver it |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepTimes:
    """Steps since the start, and where the serving thread's time went, in seconds.

    On a GPU `launch_s` is the time to put steps into its queue; on the CPU, where nothing is queued, it is the computation.
    """

    steps: int = 0
    ahead: int = 0
    """Steps that were launched while the one before them computed; the others were launched into an idle device."""
    late: int = 0
    """Steps ahead that were sampled when the tokens before were delivered: penalties and bad words follow them, and top_p
    without top_k waits for the device."""
    propose_s: float = 0.0
    """Drafts; on a GPU the time to put the draft model's steps into its queue."""
    schedule_s: float = 0.0
    launch_s: float = 0.0
    """Batch, engine, sampler."""
    wait_s: float = 0.0
    """Waiting for the device."""
    deliver_s: float = 0.0
    """Updates, text, results."""

    @property
    def host_s(self) -> float:
        """All but the waiting."""
        return self.propose_s + self.schedule_s + self.launch_s + self.deliver_s
