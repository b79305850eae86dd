"""Speculation in the serving loop: whom to draft for, the drafts, and what is learnt from their verification.

    wants_drafts -> propose -> (Scheduler.schedule, Runner.launch, Runner.collect, Scheduler.update) -> observe

The core asks before it plans a step. While drafts pay, a step is planned when the one before it has its result, since that decides
where it begins; while they do not, steps are planned ahead as without speculation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..logits import SamplingState
from ..plan import RequestUpdate, StepPlan
from ..request import Request
from ..runner import Runner, StepResult
from ..scheduler import Scheduler
from .adaptive import AdaptiveLengths
from .config import MAX_TREE_NODES, SpeculativeConfig
from .hidden_rows import StepHidden, kept_rows
from .metrics import SpeculativeMetrics
from .moves import SlotMoves
from .proposer import Drafts, Proposer, Target, Verified
from .verification import Outcome, StepDrafts


class Speculation:
    """Speculation of one LLM; for its serving thread.

    Args:
        proposer: makes the drafts.
        drafts_on_host: whether their values are brought to the host before a step is planned (a trace records them).
        clock: seconds, for measuring steps.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        proposer: Proposer,
        scheduler: Scheduler,
        runner: Runner,
        *,
        drafts_on_host: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.proposer = proposer
        runner.capture_hidden(proposer.hidden_layers)
        self.lengths = AdaptiveLengths(config.num_draft_tokens, adaptive=config.adaptive)
        self.totals = SpeculativeMetrics()
        self._scheduler, self._runner, self._clock = scheduler, runner, clock
        self._on_host = drafts_on_host or runner.engine.device.type == "cpu"
        self._metrics: dict[str, SpeculativeMetrics] = {}
        self._vocab_size = runner.engine.vocab_size
        self._since: float | None = None
        self._follows = self._verifies = self._asked = False
        """Whether a step is in flight, whether it verifies drafts, and whether drafts were sought for the one that comes next."""

    # --- requests -----------------------------------------------------------------------------------------------

    def add(self, request: Request, state: SamplingState, metrics: SpeculativeMetrics) -> None:
        """A new request that may speculate; what becomes of its drafts is counted in `metrics`."""
        self._metrics[request.request_id] = metrics
        self.proposer.add(request, state)

    def release(self, request: Request) -> None:
        """A request has ended; harmless for one that does not speculate."""
        metrics = self._metrics.pop(request.request_id, None)
        if metrics is None:
            return
        metrics.num_tokens += request.num_output_tokens
        self.totals.num_tokens += request.num_output_tokens
        self.lengths.release(request.request_id)
        self.proposer.release(request.request_id)

    # --- drafts -------------------------------------------------------------------------------------------------

    def wants_drafts(self) -> bool:
        """Whether the next step may have drafts, so that it cannot be planned ahead; asked once per step.

        While a step is in flight the answer is no where no drafts promise to pay: waiting for it would cost more than asking does.
        """
        if self._verifies:  # its result decides where the next step begins
            return True
        if not self._metrics or self.lengths.rests():
            return False
        return not self._follows or self.lengths.promising(*self._group(self._candidates(in_flight=True)))

    def propose(self) -> StepDrafts | None:
        """Drafts for the next step, left in the requests; None where nobody gets any. Whatever the proposer raises passes."""
        targets = self._targets()
        self._asked = bool(targets)
        if not targets:
            return None
        drafts = self.proposer.propose(targets)
        self._check(targets, drafts)
        if drafts.parents is not None:
            self._check_trees(drafts)
        if isinstance(drafts.token_ids, torch.Tensor) and (
            self._on_host or any(target.state.follows_words for target in targets)
        ):
            drafts.token_ids = [row[:n] for row, n in zip(drafts.token_ids.tolist(), drafts.lengths)]
        for number, (target, length) in enumerate(zip(targets, drafts.lengths)):
            known = None if isinstance(drafts.token_ids, torch.Tensor) else drafts.token_ids[number]
            target.request.draft_token_ids = [0] * length if known is None else list(known[:length])
        return StepDrafts(drafts, {target.request.request_id: i for i, target in enumerate(targets)})

    def _targets(self) -> list[Target]:
        """The requests that get drafts, with room for them."""
        ready, num_others = self._candidates()
        if not ready:
            return []
        names, limits, num_others, budget = self._group((ready, num_others))
        if self.config.tree is None:
            chosen = self.lengths.choose(names, limits, num_others, budget)
        else:
            chosen = self._trees(self.config.tree, limits, budget)
        targets = []
        for request, wanted in zip(ready, chosen):
            room = self._scheduler.reserve_drafts(request, wanted) if wanted else 0
            if room:
                targets.append(Target(request, self._runner.state(request.request_id), room))
        return targets

    def _candidates(self, *, in_flight: bool = False) -> tuple[list[Request], int]:
        """The requests that may get drafts, and how many others decode. in_flight: those of the step after the one in flight."""
        ready, num_others = [], 0
        for request in self._scheduler.running:
            if request.prefilling:
                continue
            if request.request_id in self._metrics and (
                in_flight or request.num_computed_tokens + 1 == request.num_tokens
            ):
                ready.append(request)
            else:
                num_others += 1
        return ready, num_others

    def _group(self, candidates: tuple[Sequence[Request], int]) -> tuple[list[str], list[int], int, int]:
        """What lengths are chosen by: the requests' ids, the most drafts of each, how many others decode, most drafts in all."""
        ready, num_others = candidates
        limits = [request.max_total_tokens - request.num_tokens - 1 for request in ready]
        budget = self._scheduler.config.max_batch_tokens - len(ready) - num_others
        return [request.request_id for request in ready], limits, num_others, budget

    @staticmethod
    def _trees(tree: Sequence[Sequence[int]], limits: Sequence[int], budget: int) -> list[int]:
        """Nodes for each request: the whole tree, or none where it does not fit the step or the text's length."""
        chosen = []
        for limit in limits:
            fits = len(tree) <= min(limit, budget)
            chosen.append(len(tree) if fits else 0)
            budget -= chosen[-1]
        return chosen

    def _check(self, targets: Sequence[Target], drafts: Drafts) -> None:
        """What the runtime relies on. Raises ValueError."""
        name = type(self.proposer).__name__
        if len(drafts.lengths) != len(targets) or len(drafts.token_ids) != len(targets):
            raise ValueError(
                f"{name} gave drafts for {len(drafts.lengths)} requests; allowed: {len(targets)}, one each"
            )
        for number, (target, length) in enumerate(zip(targets, drafts.lengths)):
            if not 0 <= length <= target.num_drafts:
                raise ValueError(
                    f"{name} gave {length} drafts for request {target.request.request_id!r}; allowed: at most "
                    f"{target.num_drafts}, which is what it was asked for and what fits the step"
                )
            if isinstance(drafts.token_ids, torch.Tensor):
                continue
            tokens = drafts.token_ids[number]
            if len(tokens) < length or (length and not 0 <= min(tokens) <= max(tokens) < self._vocab_size):
                raise ValueError(
                    f"{name} gave the drafts {list(tokens)} of length {length} for request "
                    f"{target.request.request_id!r}; allowed: as many token ids, from 0 to {self._vocab_size - 1}"
                )

    def _check_trees(self, drafts: Drafts) -> None:
        """Raises ValueError for trees that the engine or the verification cannot take."""
        assert drafts.parents is not None
        name = type(self.proposer).__name__
        if not getattr(self._runner.engine, "takes_tree_masks", False):
            raise ValueError(f"{name} drafts trees, and the engine's attention takes no tree masks; draft chains")
        if any(drafts.drawn):
            raise ValueError(f"{name} gave trees of drawn drafts; allowed: certain ones, such as the likeliest tokens")
        for parents, length in zip(drafts.parents, drafts.lengths):
            if any(not -1 <= parent < node for node, parent in enumerate(parents[:length])) or length > MAX_TREE_NODES:
                raise ValueError(
                    f"{name} gave a tree with the parents {list(parents)}; allowed: at most {MAX_TREE_NODES} nodes, each "
                    "behind its parent, -1 for the last known token"
                )

    # --- results ------------------------------------------------------------------------------------------------

    def keep_branches(self, outcomes: Sequence[Outcome], plan: StepPlan) -> None:
        """Moves keys and values of accepted branches of trees to where the texts go on.

        Before the scheduler takes the tokens in: what a request that ends has computed may go to others, by the prefix cache.
        """
        branched = [outcome for outcome in outcomes if outcome.nodes and outcome.nodes[-1] >= len(outcome.nodes)]
        if not branched:
            return
        moves = SlotMoves(self._runner.engine)
        for outcome in branched:
            row = plan.others[outcome.index - len(plan.decodes)]
            if not row.request.is_finished:
                moves.add(row.request.block_ids, row.start + row.num_tokens - row.num_draft_tokens, outcome.nodes)
        moves.launch()

    def observe(self, result: StepResult, plan: StepPlan, updates: Sequence[RequestUpdate]) -> None:
        """Takes in what became of a step's drafts, and its hidden states."""
        verified = self._count(result.outcomes, plan, updates)
        if result.hidden is not None:
            self._add_hidden(verified, result.hidden, plan, {outcome.index: outcome for outcome in result.outcomes})
        if verified:
            self.proposer.observe(list(verified.values()))

    def _count(
        self, outcomes: Sequence[Outcome], plan: StepPlan, updates: Sequence[RequestUpdate]
    ) -> dict[int, Verified]:
        """Counts what became of drafts; what to tell the proposer of them, by index in the plan."""
        new_tokens = {id(update.request): len(update.new_token_ids) for update in updates}
        verified: dict[int, Verified] = {}
        alike: Counter[tuple[int, int, int]] = Counter()
        for outcome in outcomes:
            row = plan.others[outcome.index - len(plan.decodes)]
            request, num_tokens = row.request, new_tokens.get(id(row.request), 0)
            metrics = self._metrics.get(request.request_id)
            if metrics is None or not num_tokens:
                continue  # it ended meanwhile
            num_drafts, num_accepted = outcome.depth, len(outcome.nodes)
            counted = min(num_accepted, num_tokens)  # it may have ended inside the drafts
            metrics.count(num_drafts, counted, num_tokens)
            alike[num_drafts, counted, num_tokens] += 1
            self.lengths.count(request.request_id, num_drafts, num_accepted)
            verified[outcome.index] = Verified(request, num_drafts, num_accepted, row.start, outcome.nodes)
        for counts, times in alike.items():
            self.totals.count(*counts, times)
        return verified

    def _add_hidden(
        self, verified: dict[int, Verified], hidden: StepHidden, plan: StepPlan, outcomes: Mapping[int, Outcome]
    ) -> None:
        """Adds hidden states to what the proposer is told, for requests without drafts, too."""
        for index, request, start, rows in kept_rows(plan, hidden, outcomes):
            if request.request_id not in self._metrics:
                continue
            item = verified.setdefault(index, Verified(request, 0, 0, start))
            item.states, item.rows = hidden.states, rows

    def begin_step(self, in_flight: StepPlan | None) -> None:
        """A step begins; in_flight: what the device is busy with."""
        self._follows = in_flight is not None
        self._verifies = in_flight is not None and in_flight.has_drafts
        if in_flight is None:
            self._since = self._clock()

    def end_step(self, plan: StepPlan, tokens: npt.NDArray[np.int64] | Sequence[Sequence[int]]) -> None:
        """A step's tokens have come (`StepResult.tokens`): its time is that since the result before it, or since it began."""
        now, since = self._clock(), self._since
        self._since = now
        asked, self._asked = self._asked, False
        depth = 0
        for row in plan.others:
            if row.num_tokens != 1 + row.num_draft_tokens:
                return  # a prompt among them
            depth = max(depth, row.num_draft_tokens)
        if since is not None:
            num_new = len(tokens) if isinstance(tokens, np.ndarray) else sum(map(len, tokens))
            depth = depth or (-1 if asked else 0)
            self.lengths.observe(plan.num_sequences, num_new, plan.num_tokens, depth, now - since)
