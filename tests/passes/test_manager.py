"""The manager: order, records, verification, dumps and comparison."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from camshaft.graph.program import Program
from camshaft.graph.verify import VerificationError
from camshaft.passes.base import GraphPass, Stage
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import canonicalize_passes, decoder_passes, fuse_passes, module_passes
from graph_cases import LlamaNorm, captured, rows, run


class Nothing(GraphPass):
    name = "nothing"
    stage = Stage.FUSE

    def run(self, program: Program) -> int:
        return 0


class Broken(GraphPass):
    """Forgets the example value of the node that it makes."""

    name = "broken"
    stage = Stage.FUSE

    def run(self, program: Program) -> int:
        output = next(node for node in program.graph.nodes if node.op == "output")
        last = output.args[0][0]
        with program.graph.inserting_before(output):
            output.args = ((program.graph.call_function(torch.ops.aten.neg.default, (last,)),),)
        return 1


class Changed(Nothing):
    name = "changed"
    numerics = "changed"


@functools.cache
def _norm() -> Program:
    return captured(LlamaNorm(8), rows(8))


def test_pipelines_are_in_the_order_of_the_stages() -> None:
    order = list(Stage)
    for passes in (module_passes(), decoder_passes(block_size=16)):
        again = ("normalize", "bind_stored_weights")  # run twice
        stages = [order.index(p.stage) for p in passes if p.name not in again]
        assert stages == sorted(stages)
    assert [p.name for p in module_passes()] == [p.name for p in (*canonicalize_passes(), *fuse_passes())]


def test_records_and_original() -> None:
    program = _norm()
    seen = []
    result = PassManager(module_passes(), on_pass=seen.append).run(program)
    assert list(result.history) == seen
    assert {r.name: r.num_matches for r in seen}["match_rms_norm"] == 1
    assert all(r.seconds >= 0 and len(r.fingerprint) == 12 and r.max_error is None for r in seen)
    assert program.history == ()
    x = torch.randn(1, 8, 8)
    torch.testing.assert_close(run(result, (x,)), run(program, (x,)), rtol=1e-6, atol=1e-6)


def test_broken_pass_is_named() -> None:
    with pytest.raises(VerificationError, match="after broken: neg"):
        PassManager([Nothing(), Broken()]).run(_norm())


def test_comparison_ends_where_the_meaning_changes() -> None:
    compared = []
    manager = PassManager([Nothing(), Changed(), Nothing()], compare=lambda a, b: compared.append((a, b)) or 0.5)
    errors = [record.max_error for record in manager.run(_norm()).history]
    assert errors == [0.5, None, None]
    assert len(compared) == 1


def test_dump(tmp_path: Path) -> None:
    PassManager([Nothing(), Nothing()], dump_dir=tmp_path / "dump").run(_norm())
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == [
        "00-capture.txt",
        "01-nothing.txt",
        "02-nothing.txt",
    ]
    assert "aten.rsqrt" in (tmp_path / "dump" / "00-capture.txt").read_text()


def test_fingerprint_follows_options() -> None:
    prints = [PassManager(decoder_passes(block_size=size)).fingerprint() for size in (8, 16, 16)]
    assert prints[0] != prints[1] == prints[2]
