"""The pass manager: runs passes in order, times and counts them, verifies each result, dumps and compares on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..graph.dump import dump_program
from ..graph.program import PassRecord, Program
from ..graph.verify import verify
from .base import GraphPass

logger = logging.getLogger(__name__)

CompareFunction = Callable[[Program, Program], float]


class PassManager:
    """Runs a list of passes over a program.

    passes: the pipeline, in order. dump_dir: where the graph before and after each pass is written, or None.
    compare: (before, after) -> largest absolute difference of their outputs; called after each pass until
    the first one whose outputs change their meaning, and recorded in the pass table. on_pass: called with each record (progress).
    """

    def __init__(
        self,
        passes: Sequence[GraphPass],
        *,
        dump_dir: Path | None = None,
        compare: CompareFunction | None = None,
        on_pass: Callable[[PassRecord], None] | None = None,
    ) -> None:
        self.passes = list(passes)
        self.dump_dir = dump_dir
        self.compare = compare
        self.on_pass = on_pass
        self._comparable = True

    def run(self, program: Program) -> Program:
        """Returns the rewritten program with one PassRecord per pass added to its history; raises VerificationError."""
        verify(program, after="capture")
        self._comparable = True
        self._dump(program, "00-capture")
        for index, graph_pass in enumerate(self.passes, start=1):
            program = self._run_one(program, graph_pass)
            self._dump(program, f"{index:02d}-{graph_pass.name}")
        return program

    def _run_one(self, program: Program, graph_pass: GraphPass) -> Program:
        before = len(program.graph.nodes)
        start = time.perf_counter()
        result = graph_pass(program)
        seconds = time.perf_counter() - start
        verify(result.program, after=graph_pass.name)
        error = None
        if graph_pass.numerics == "changed":
            self._comparable = False
        if self.compare is not None and self._comparable:
            error = self.compare(program, result.program)
        record = PassRecord(
            name=graph_pass.name,
            stage=graph_pass.stage.value,
            num_matches=result.num_matches,
            seconds=seconds,
            nodes_before=before,
            nodes_after=len(result.program.graph.nodes),
            fingerprint=graph_pass.fingerprint(),
            max_error=error,
        )
        logger.debug("pass %s: %d matches in %.3f s", record.name, record.num_matches, record.seconds)
        if self.on_pass is not None:
            self.on_pass(record)
        return replace(result.program, history=(*program.history, record))

    def _dump(self, program: Program, label: str) -> None:
        if self.dump_dir is not None:
            dump_program(program, self.dump_dir / f"{label}.txt")

    def fingerprint(self) -> str:
        """Identity of the whole pipeline: the names and fingerprints of its passes."""
        return "+".join(f"{p.name}:{p.fingerprint()}" for p in self.passes)
