"""A module's Program behind a flat list of tensors: what `camshaft.compile` and the torch.compile backend share.

    tensors -> [executor: the plan's segments] -> tensors -> leaves: tensors, sizes, weights and constants, as in the trace

The passes drop copies and merge equal nodes. Where an output would share memory with an input, a weight or another output
that it did not share memory with in the trace, it is copied.
"""

from __future__ import annotations

import logging
import operator
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..graph.program import Program
from ..passes.base import GraphPass
from ..passes.manager import PassManager
from ..passes.pipeline import module_passes
from .executor import Executor
from .partition import partition
from .segment import Plan, Segment
from .targets.base import Lowered, LoweringError, LowerRequest, Target, get_target

logger = logging.getLogger(__name__)

REPEATS = 7
"""Times that a candidate of target="auto" runs; the median counts."""
WORTH = 0.95
"""Another target must take less than this part of eager's time to be chosen."""


@dataclass(frozen=True)
class Leaf:
    """One output leaf: the tensor of a slot (`index`, a copy where `copy`), a weight, a size or a constant."""

    kind: Literal["tensor", "weight", "size", "constant"]
    value: Any = None
    index: int = -1
    copy: bool = False


@dataclass(frozen=True)
class FlatProgram:
    """A rewritten Program whose outputs are tensors that it computes or inputs, and the leaves made of them.

    symbols: varying size -> (input, axis) to read it from; inputs count user inputs in graph order.
    """

    program: Program
    leaves: tuple[Leaf, ...]
    symbols: dict[Any, tuple[int, int]]

    def sizes(self, inputs: Sequence[Tensor]) -> dict[Any, int]:
        """The value of each varying size in these inputs."""
        return {symbol: inputs[index].shape[axis] for symbol, (index, axis) in self.symbols.items()}

    def assemble(self, results: Sequence[Tensor], inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Any]:
        """The output leaves, out of what the executor returned."""
        leaves: list[Any] = []
        sizes = self.sizes(inputs) if any(leaf.kind == "size" for leaf in self.leaves) else {}
        for leaf in self.leaves:
            if leaf.kind == "tensor":
                leaves.append(results[leaf.index].clone() if leaf.copy else results[leaf.index])
            elif leaf.kind == "weight":
                leaves.append(weights[leaf.value].clone() if leaf.copy else weights[leaf.value])
            else:
                leaves.append(evaluate(leaf.value, sizes) if leaf.kind == "size" else leaf.value)
        return leaves


def evaluate(size: Any, sizes: Mapping[Any, int]) -> Any:
    """The value of a SymInt, SymFloat or SymBool of a trace, for values of its symbols."""
    result = size.node.expr.xreplace(sizes)
    return (
        bool(result)
        if isinstance(size, torch.SymBool)
        else float(result)
        if isinstance(size, torch.SymFloat)
        else int(result)
    )


def rewrite(program: Program, passes: Sequence[GraphPass] | None = None, dump_dir: Path | None = None) -> FlatProgram:
    """Runs the passes of a module (or others) and separates the outputs. Raises ValueError for outputs that cannot be made."""
    shared = _sharing(program)
    program = PassManager(module_passes() if passes is None else passes, dump_dir=dump_dir).run(program).clone()
    now = _sharing(program)
    output = _output(program)
    symbols = _symbols(program)
    leaves: list[Leaf] = []
    tensors: list[fx.Node] = []
    for index, item in enumerate(output.args[0]):
        if not isinstance(item, fx.Node):
            leaves.append(Leaf("constant", item))
            continue
        value = item.meta["val"]
        if not isinstance(value, torch.Tensor):
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                missing = value.node.expr.free_symbols - set(symbols)
                if missing:
                    raise ValueError(
                        f"{program.name}: output {index} is a number computed from values of tensors; return a tensor instead"
                    )
            leaves.append(Leaf("size" if hasattr(value, "node") else "constant", value))
            continue
        spec = program.input_of(item)
        copy = now[index] - shared[index] != set()
        if spec is not None and spec.kind == "weight":
            leaves.append(Leaf("weight", spec.key, copy=copy))
            continue
        if item not in tensors:
            tensors.append(item)
        leaves.append(Leaf("tensor", index=tensors.index(item), copy=copy))
    output.args = (tuple(tensors),)
    program.graph_module.recompile()
    return FlatProgram(program, tuple(leaves), symbols)


def _output(program: Program) -> fx.Node:
    return next(node for node in program.graph.nodes if node.op == "output")


def _symbols(program: Program) -> dict[Any, tuple[int, int]]:
    symbols: dict[Any, tuple[int, int]] = {}
    for index, (node, _) in enumerate(program.placeholders("user")):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols.setdefault(size.node.expr, (index, axis))
    return symbols


def _sharing(program: Program) -> list[set[Any]]:
    """For each output, what it may share memory with: names of inputs and weights, and indices of earlier outputs."""
    roots = [_root(item) if isinstance(item, fx.Node) else None for item in _output(program).args[0]]
    shared: list[set[Any]] = []
    for index, root in enumerate(roots):
        names = {root.name} if root is not None and root.op == "placeholder" else set()
        shared.append(names | {i for i in range(index) if root is not None and roots[i] is root})
    return shared


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a value may be a view of, by the schemas of the operators in between."""
    while node.op == "call_function" and node.all_input_nodes:
        if node.target is operator.getitem:
            node = node.all_input_nodes[0]
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(result.alias_info is not None for result in schema.returns):
            break
        node = node.all_input_nodes[0]
    return node


# ------------------------------------------------------------------------------------------------------------- lowering
class Runner:
    """A lowered program with its weights bound: user inputs in graph order -> output leaves."""

    def __init__(
        self, flat: FlatProgram, plan: Plan, lowered: Mapping[str, Lowered], target: str, report: list[str]
    ) -> None:
        self.flat, self.plan, self.target, self.report = flat, plan, target, report
        self._lowered = lowered
        self._weights: Mapping[str, Tensor] = {}
        self._executor: Executor | None = None

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Binds the program's weights, by the names of its WeightMap; may be called again with others."""
        self._weights = weights
        self._executor = Executor(self.plan, self._lowered, weights)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        """Runs the program; no gradients are recorded."""
        assert self._executor is not None, "bind was not called"
        with torch.no_grad():
            results = self._executor.run(inputs)
            return self.flat.assemble(results, inputs, self._weights)


def lower(flat: FlatProgram, target_name: str, device: torch.device, directory: Path) -> Runner:
    """Partitions and lowers for one target into `directory`; operators that it refuses run in PyTorch, and the report says so.

    Raises LoweringError where the target fails and names no operator of the program that is to blame.
    """
    target = get_target(target_name)
    if target.fixed_sizes and any(isinstance(size, str) for spec in flat.program.inputs for size in spec.shape):
        raise LoweringError(
            f"{target.name} engines take one size only, and dynamic_shapes lets sizes of {flat.program.name} vary; leave "
            "dynamic_shapes out and compile once for each size, or use another target"
        )
    refused: set[str] = set()
    present = {str(node.target) for node in flat.program.graph.nodes if node.op == "call_function"}
    while True:
        plan = partition(flat.program, _supports(target, refused))
        try:
            lowered = {s.id: _lower_segment(target, s, device, directory) for s in plan.segments.values()}
        except LoweringError as error:
            new = set(error.operators) & present - refused
            if not new:
                raise
            refused |= new
            continue
        return Runner(flat, plan, lowered, target_name, list(plan.report))


def _supports(target: Target, refused: set[str]) -> Callable[[fx.Node], bool]:
    return lambda node: target.supports(node) and str(node.target) not in refused


def _lower_segment(target: Target, segment: Segment, device: torch.device, directory: Path) -> Lowered:
    if segment.eager:
        return get_target("eager").load(segment, None, device)
    if not target.extension:
        return target.load(segment, None, device)
    file = directory / f"{segment.id}.{target.extension}"
    if not file.is_file():
        file.write_bytes(target.lower(segment, LowerRequest(device=device, max_tokens=0)).data)
    return target.load(segment, file, device)


def read_weights(flat: FlatProgram, device: torch.device) -> dict[str, Tensor]:
    """Every weight that the program reads, on the device; weights that are there already are shared, not copied."""
    names = {spec.key for _, spec in flat.program.placeholders("weight")}
    names |= {leaf.value for leaf in flat.leaves if leaf.kind == "weight"}
    return {name: flat.program.weights[name].load().detach().to(device) for name in sorted(names)}


def lower_for(
    flat: FlatProgram, target_name: str, device: torch.device, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> Runner:
    """The bound Runner for a target; "auto" is inductor on CUDA, and on the CPU the faster of eager and onnxruntime.

    inputs: what candidates are timed on. Raises ValueError for a target that cannot run here, LoweringError.
    """
    if target_name != "auto":
        reason = get_target(target_name).unavailable(device) or _dtype_problem(target_name, inputs, weights)
        if reason is not None:
            raise ValueError(
                f"target {target_name} cannot run on {device.type}: {reason}; use target='auto' or 'eager'"
            )
        return _lower_bound(flat, target_name, device, weights)
    if device.type == "cuda":
        reason = get_target("inductor").unavailable(device)
        runner = _lower_bound(flat, "inductor" if reason is None else "eager", device, weights)
        runner.report += [] if reason is None else [f"auto: inductor cannot run here ({reason}); eager"]
        return runner
    eager = _lower_bound(flat, "eager", device, weights)
    name = "onnxruntime"
    reason = get_target(name).unavailable(device) or _dtype_problem(name, inputs, weights)
    if reason is None and not eager.plan.steps:
        reason = "there is nothing to compute"
    if reason is not None:
        return _noted(eager, f"auto: eager ({reason})")
    try:
        other = _lower_bound(flat, name, device, weights)
        times = {"eager": _seconds(eager, inputs), name: _seconds(other, inputs)}
    except LoweringError as error:
        return _noted(eager, f"auto: eager ({error})")
    best = other if times[name] < WORTH * times["eager"] else eager
    table = ", ".join(f"{key} {1e3 * value:.3f} ms" for key, value in times.items())
    return _noted(best, f"auto: {best.target} (whole module on the example inputs: {table})")


def _noted(runner: Runner, line: str) -> Runner:
    runner.report.append(line)
    logger.info("%s: %s", runner.flat.program.name, line)
    return runner


def _dtype_problem(target_name: str, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> str | None:
    if target_name != "onnxruntime":
        return None
    allowed = (torch.float32, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
    odd = sorted({str(t.dtype) for t in (*inputs, *weights.values()) if t.dtype not in allowed})
    return f"onnxruntime's CPU kernels do not take {', '.join(odd)}" if odd else None


def _lower_bound(flat: FlatProgram, name: str, device: torch.device, weights: Mapping[str, Tensor]) -> Runner:
    with tempfile.TemporaryDirectory(prefix="camshaft-module-") as directory:
        runner = lower(flat, name, device, Path(directory))
        runner.bind(weights)
    return runner


def _seconds(runner: Runner, inputs: Sequence[Tensor]) -> float:
    """Median time of a call; long calls are repeated less."""
    runner(inputs)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < 1.0:
        start = time.perf_counter()
        runner(inputs)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
