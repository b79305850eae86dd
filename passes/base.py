"""What a pass is: a named, fingerprinted rewrite of a Program."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from torch import fx

from ..graph.capture import drop_unused_inputs
from ..graph.program import Program


class Stage(StrEnum):
    """The stages of the pipeline, in order."""

    CANONICALIZE = "canonicalize"
    QUANTIZE = "quantize"
    LORA = "lora"
    SHARD = "shard"
    FUSE = "fuse"
    CACHE = "cache"
    SPLIT = "split"


@dataclass(frozen=True)
class PassResult:
    """A rewritten program and the number of places that were rewritten (0 is a legal answer)."""

    program: Program
    num_matches: int


class GraphPass:
    """One rewrite. A subclass sets `name`, `stage` and implements `run`, which may change the clone that it is given.

    numerics: "exact" (outputs equal to the last bit), "reordered" (equal up to the rounding of another order of
    operations), "quantized" (values are rounded to fewer bits) or "changed" (the outputs mean something else, for example
    only the rows that are sampled; nothing is compared from there on).
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    numerics: ClassVar[str] = "exact"

    def run(self, program: Program) -> int:
        """Rewrites `program` in place and returns the number of matches."""
        raise NotImplementedError

    def __call__(self, program: Program) -> PassResult:
        """Runs the pass on a copy of `program`, cleans the graph up and drops inputs that nothing reads any more."""
        work = program.clone()
        num_matches = self.run(work)
        work.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        drop_unused_inputs(work)
        work.graph_module.recompile()
        return PassResult(work, num_matches)

    def options(self) -> dict[str, Any]:
        """The options that this instance was bound to; part of the fingerprint."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def fingerprint(self) -> str:
        """12 hex digits that change when the pass's source or options change."""
        text = inspect.getsource(inspect.getmodule(type(self)) or type(self)) + repr(sorted(self.options().items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
