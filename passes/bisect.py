"""bisect over the pass list: which pass is the first after which the program computes something else?

    captured --pass 1--> program 1 --pass 2--> program 2 ... --pass n--> program n
        |                    |                    |                          |
        '------------------ each is run on the same row of tokens and compared with the captured one

Every version is run operator by operator on the CPU, so no target is involved. A paged program is run on one row that
begins at position 0: what its cache holds is then that row itself, so paged attention is dense attention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.ops import dense_attention
from ..graph.program import Program
from ..graph.quant_ops import saturate
from ..graph.verify import VerificationError, verify
from .base import GraphPass
from .fuse_rope_cache import PAGED_ROPE_ATTENTION
from .match_rope import ROPE
from .page_attention import PAGED_ATTENTION

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PassCheck:
    """One pass of a bisection.

    index: place in the pass list, from 1. error: `relative_error` of the logits against the captured program's, inf where
    the program could not be run. problem: why it could not, or None.
    """

    index: int
    name: str
    stage: str
    num_matches: int
    error: float
    ok: bool
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class PassBisection:
    """What a bisection over passes found.

    checks: one per pass that ran. program: the last legal program. tolerance: largest `relative_error` that is allowed.
    """

    checks: tuple[PassCheck, ...]
    program: Program
    tolerance: float

    @property
    def first_bad(self) -> PassCheck | None:
        """The first pass after which the outputs leave the tolerance, or None."""
        return next((check for check in self.checks if not check.ok), None)


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude (at least 1e-6); inf for NaN or another shape."""
    if expected.shape != actual.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    want, got = expected.detach().double().cpu(), actual.detach().double().cpu()
    error = float((want - got).abs().max()) / max(1e-6, float(want.abs().max()))
    return error if math.isfinite(error) else math.inf


def random_row(program: Program, num_tokens: int, seed: int) -> Tensor:
    """[num_tokens] int64 random token ids of the program's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(program.info.get("vocab_size", 32)), (num_tokens,), generator=generator)


def run_row(program: Program, token_ids: Tensor, *, hidden: Tensor | None = None) -> Tensor:
    """Logits [T, V] of one row of tokens [T] int64 from position 0, operator by operator on the CPU, whether paged or not.

    hidden: [T, H] for a program that reads hidden states, too.
    """
    num_tokens = token_ids.shape[0]
    rows = torch.arange(num_tokens)
    given = {"token_ids": token_ids[None], "positions": rows[None], "sample_rows": rows}
    if hidden is not None:
        given["hidden"] = hidden[None]
    arguments: list[Tensor] = []
    for _, spec in program.placeholders():
        if spec.kind == "weight":
            arguments.append(program.weights[spec.key].load().cpu())
        elif spec.name in given:
            arguments.append(given[spec.name])
        elif spec.kind in ("cache", "metadata"):
            arguments.append(torch.empty(0, dtype=spec.dtype))  # read by paged attention alone
        else:
            raise ValueError(f"{program.name} has the input {spec.name!r}; only decoders can be bisected")
    with torch.no_grad():
        return _RowInterpreter(program.graph_module).run(*arguments)[0][0]


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of `dtype` gives them back."""
    return x if x.dtype == dtype else saturate(x, dtype).to(x.dtype)


class _RowInterpreter(fx.Interpreter):
    """Runs a graph, with paged attention over the row's own keys and values."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is PAGED_ROPE_ATTENTION:
            q, k, *rest, cos, sin, interleaved = args
            q, k = (ROPE(tensor, cos, sin, interleaved) for tensor in (q, k))
            return self.call_function(PAGED_ATTENTION, (q, k, *rest), kwargs)
        if target is not PAGED_ATTENTION:
            return super().call_function(target, args, kwargs)
        q, k, v, k_cache, v_cache, *_, sinks, slopes, scale, window, softcap = args
        k, v = _stored(k, k_cache.dtype), _stored(v, v_cache.dtype)
        q_BHTD, k_BGTD, v_BGTV = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return dense_attention(q_BHTD, k_BGTD, v_BGTV, sinks, slopes, scale, window, softcap)


def bisect_passes(
    program: Program,
    passes: Sequence[GraphPass],
    *,
    tolerance: float,
    num_tokens: int = 24,
    seed: int = 0,
    on_check: Callable[[PassCheck], None] | None = None,
) -> PassBisection:
    """Runs the passes one by one and compares each result with `program` on one row of random tokens.

    tolerance: largest allowed `relative_error` of the logits. num_tokens: length of the row. on_check: called after each pass.
    The passes go on after one that changes the result, and end with one that leaves an illegal program.
    """
    token_ids = random_row(program, num_tokens, seed)
    expected = run_row(program, token_ids)
    checks: list[PassCheck] = []
    for index, graph_pass in enumerate(passes, start=1):
        result = graph_pass(program)
        problem, error = None, math.inf
        try:
            verify(result.program, after=graph_pass.name)
            error = relative_error(expected, run_row(result.program, token_ids))
        except (VerificationError, RuntimeError, ValueError) as reason:
            problem = f"{type(reason).__name__}: {str(reason).strip().splitlines()[0]}"
        check = PassCheck(
            index=index,
            name=graph_pass.name,
            stage=graph_pass.stage.value,
            num_matches=result.num_matches,
            error=error,
            ok=error <= tolerance,
            problem=problem,
        )
        logger.debug("bisect: %s, error %.3g", check.name, check.error)
        checks.append(check)
        if on_check is not None:
            on_check(check)
        if problem is not None:
            break
        program = result.program
    return PassBisection(checks=tuple(checks), program=program, tolerance=tolerance)
