"""Calibration: a program is run node by node over all calibration tokens at once, one weight in memory at a time.

    tokens      [s0 s0 s0 | s1 s1 | s2 s2 s2 s2 | ...]      packed rows of whole sequences, a chunk each
    for each segment of the graph, from one quantizable input to the next:
        x in all chunks --> statistics, quantization --> the quantized layer and what follows it, chunk by chunk

What is kept between segments are the values that a later node reads (the residual stream and one input), so memory is those
activations and the weights of one segment; a weight is read at its node and dropped with its segment. Layers behind a quantized
one see its output: what it lost is in their statistics. Every operator of a decoder but attention is per token (`verify_packed`
holds a build to that), so a row may hold many sequences, and attention alone is run sequence by sequence. Deterministic: chunks,
order and sums depend on the data alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...graph import ops
from ...graph.program import Program
from ..match import aten, is_call
from ..resolve_masks import ATTENTION

CONTEXT = 512
"""Tokens of a calibration sequence unless told otherwise."""
MAX_TOKENS = 128 * CONTEXT
"""Tokens that calibration looks at, at most, unless told otherwise."""
MIN_TOKENS = 256
"""Fewest tokens whose statistics mean anything."""

ProgressCallback = Callable[[int, int, str], None]
"""(layers done, layers in all, name of the layer that is next)."""


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Token ids to calibrate on: sequences that do not see each other."""

    sequences: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[int]], *, context: int = CONTEXT, max_tokens: int = MAX_TOKENS
    ) -> CalibrationData:
        """Cuts rows of token ids into sequences of at most `context` tokens, and takes the first `max_tokens`.

        Raises ValueError where fewer than MIN_TOKENS tokens are left, or for ids that are no integers of 0 or more.
        """
        sequences: list[tuple[int, ...]] = []
        left = max_tokens
        for row in rows:
            for begin in range(0, len(row), context):
                piece = tuple(int(token) for token in row[begin : begin + min(context, left)])
                if len(piece) > 1:  # attention over one token is a copy: nothing is learned from it
                    sequences.append(piece)
                    left -= len(piece)
                if left <= 0:
                    break
            if left <= 0:
                break
        if any(token < 0 for sequence in sequences for token in sequence):
            raise ValueError("calibration holds a negative token id; token ids count from 0")
        data = cls(sequences=tuple(sequences))
        data.check_length(MIN_TOKENS)
        return data

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    def check_length(self, needed: int, purpose: str = "") -> None:
        """Raises ValueError where there are fewer than `needed` tokens."""
        if self.num_tokens < needed:
            raise ValueError(
                f"calibration has {self.num_tokens} tokens and needs {needed}{purpose}; give more text, of the kind that the "
                "model will see"
            )

    def digest(self) -> str:
        """16 hex digits that change when a token or a boundary does."""
        state = hashlib.sha256()
        for sequence in self.sequences:
            state.update(len(sequence).to_bytes(8, "little"))
            state.update(b"".join(token.to_bytes(8, "little") for token in sequence))
        return state.hexdigest()[:16]


@dataclass(eq=False)
class LayerInput:
    """The linear layers that read one value x, at the moment when x is known for all calibration tokens.

    layers: the nodes, in graph order. x: what they read. exclusive: nothing else reads it.
    """

    run: CalibrationRun
    x: fx.Node
    layers: tuple[fx.Node, ...]
    exclusive: bool

    @property
    def name(self) -> str:
        """The first layer's weight: what errors and progress name."""
        return self.run.weight_key(self.layers[0])

    def chunks(self) -> Iterator[Tensor]:
        """x, chunk by chunk: [tokens of the chunk, K] in the compute dtype, on the run's device."""
        for chunk in self.run.chunks:
            yield chunk.values[self.x].flatten(0, -2)

    def weight(self, layer: fx.Node) -> Tensor:
        """A layer's weight [N, K], as stored, on the run's device."""
        return self.run.load(layer.args[1])

    def scale_input(self, factor: Tensor) -> None:
        """Multiplies x by factor [K], for all that reads it: what makes x was changed to do so."""
        for chunk in self.run.chunks:
            value = chunk.values[self.x]
            chunk.values[self.x] = (value.float() * factor).to(value.dtype)

    def set_layer(self, layer: fx.Node, function: Callable[[Tensor], Tensor]) -> None:
        """Lets `function` (x [.., K] -> y [.., N] with the bias) stand for a layer from here on."""
        self.run.replaced[layer] = function

    def check_finite(self) -> None:
        """Raises ValueError where x has NaN or Inf."""
        for x in self.chunks():
            finite = torch.isfinite(x)
            if not bool(finite.all()):
                bad = int((~finite).sum())
                raise ValueError(
                    f"calibration: the input of {self.name} has {bad} values that are NaN or Inf among {x.numel()}; the model "
                    "overflows on this text in this dtype: calibrate in bfloat16 or float32, or look for damaged weights before "
                    "this layer"
                )


@dataclass(eq=False)
class _Chunk:
    """A packed row of whole sequences: their lengths, and the values that a later node reads."""

    lengths: tuple[int, ...]
    values: dict[fx.Node, Any] = field(default_factory=dict)


class CalibrationRun:
    """Runs a canonical program that is not paged yet over calibration data.

    device: where it is run, weights and activations. chunk_tokens: tokens of a packed row, at least one sequence's.
    """

    def __init__(
        self,
        program: Program,
        data: CalibrationData,
        *,
        device: torch.device,
        chunk_tokens: int = 4096,
        progress: ProgressCallback | None = None,
    ) -> None:
        vocabulary = int(program.info.get("vocab_size", 1 << 31))
        largest = max(max(sequence) for sequence in data.sequences)
        if largest >= vocabulary:
            raise ValueError(f"calibration holds token id {largest}; {program.name} has {vocabulary} tokens, from 0")
        self.program = program
        self.device = device
        self.replaced: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        self.chunks: list[_Chunk] = []
        self._progress = progress
        self._loaded: dict[fx.Node, Tensor] = {}
        self._specs = {spec.name: spec for spec in program.inputs}
        self._dies = _last_reads(program.graph)
        for group in _packed(data.sequences, chunk_tokens):
            self.chunks.append(_Chunk(tuple(map(len, group)), self._inputs(group)))

    def _inputs(self, group: list[tuple[int, ...]]) -> dict[fx.Node, Any]:
        tokens = torch.tensor([token for sequence in group for token in sequence], device=self.device)[None]
        positions = torch.cat([torch.arange(len(sequence), device=self.device) for sequence in group])[None]
        given = {"token_ids": tokens, "positions": positions}
        values: dict[fx.Node, Any] = {}
        for node, spec in self.program.placeholders():
            if spec.kind == "weight":
                continue
            if spec.name not in given:
                raise ValueError(
                    f"{self.program.name} takes {spec.name!r}; calibration runs language models, on tokens alone"
                )
            values[node] = given[spec.name]
        return values

    def weight_key(self, layer: fx.Node) -> str:
        """Name of a linear layer's weight."""
        return self._specs[layer.args[1].name].key

    def load(self, placeholder: Any) -> Tensor:
        """A weight on the run's device; kept until its segment is done."""
        if placeholder not in self._loaded:
            weight = self.program.weights[self._specs[placeholder.name].key]
            self._loaded[placeholder] = weight.to(self.device)
        return self._loaded[placeholder]

    @torch.no_grad()
    def inputs_of(self, layers: Collection[fx.Node], *, to_end: bool = False) -> Iterator[LayerInput]:
        """Stops before each group of `layers` (nodes of linear layers) that read one value, in graph order.

        What the caller does at a stop (`set_layer`, `scale_input`) is in effect from there on. to_end: also runs what is behind
        the last group, for `outputs`.
        """
        nodes = list(self.program.graph.nodes)
        groups = self._groups(nodes, set(layers))
        starts = [*groups, *([len(nodes)] if to_end else [])]
        begin = 0
        for done, end in enumerate(starts):
            self._run_segment(nodes[begin:end])
            begin = end
            if end in groups:
                if self._progress is not None:
                    self._progress(done, len(groups), groups[end].name)
                groups[end].check_finite()
                yield groups[end]
        if self._progress is not None:
            self._progress(len(groups), len(groups), "")
        self._loaded.clear()

    @torch.no_grad()
    def values_of(self, nodes: Collection[fx.Node]) -> Iterator[tuple[fx.Node, Iterator[Tensor]]]:
        """Stops behind each of `nodes`, in graph order, with its value, chunk by chunk; what follows the last one is not run."""
        order = list(self.program.graph.nodes)
        begin = 0
        for done, (end, node) in enumerate([(i, node) for i, node in enumerate(order) if node in nodes]):
            if self._progress is not None:
                self._progress(done, len(nodes), node.name)
            self._run_segment(order[begin : end + 1])
            begin = end + 1
            yield node, (chunk.values[node] for chunk in self.chunks)

    def outputs(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """(the program's first output [1, T, V], lengths of its sequences) of each chunk, after a run to the end."""
        node = next(node for node in self.program.graph.nodes if node.op == "output")
        for chunk in self.chunks:
            yield chunk.values[node.args[0][0]], chunk.lengths

    def _groups(self, nodes: list[fx.Node], layers: set[fx.Node]) -> dict[int, LayerInput]:
        """Groups of layers that read one value, by the index of the first."""
        members: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
        for index, node in enumerate(nodes):
            if node in layers:
                members.setdefault(node.args[0], []).append((index, node))
        groups = {
            found[0][0]: LayerInput(self, x, tuple(node for _, node in found), len(x.users) == len(found))
            for x, found in members.items()
        }
        return dict(sorted(groups.items()))

    def _run_segment(self, nodes: list[fx.Node]) -> None:
        calls = [node for node in nodes if node.op == "call_function"]
        for chunk in self.chunks:
            for node in calls:
                chunk.values[node] = self._call(node, chunk)
                for dead in self._dies.get(node, ()):
                    chunk.values.pop(dead, None)
        for node in calls:
            self.replaced.pop(node, None)
        self._loaded.clear()

    def _call(self, node: fx.Node, chunk: _Chunk) -> Any:
        function = self.replaced.get(node)
        if function is not None:
            return function(chunk.values[node.args[0]])

        def argument(operand: fx.Node) -> Any:
            return chunk.values[operand] if operand in chunk.values else self.load(operand)

        args = fx.node.map_arg(node.args, argument)
        kwargs = fx.node.map_arg(node.kwargs, argument)
        if is_call(node, ATTENTION):
            return _attend(args, chunk.lengths)
        target: Any = ops.DEFINITIONS.get(node.target, node.target)
        return target(*args, **kwargs)


def linear_layers(program: Program) -> list[fx.Node]:
    """The linear layers of a program whose weight is stored, in graph order."""
    stored = {node for node, _ in program.placeholders("weight")}
    return [node for node in program.graph.nodes if is_call(node, aten.linear.default) and node.args[1] in stored]


def _packed(sequences: Sequence[tuple[int, ...]], chunk_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Sequences in order, as many to a chunk as there is room for."""
    group: list[tuple[int, ...]] = []
    for sequence in sequences:
        if group and sum(map(len, group)) + len(sequence) > chunk_tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _last_reads(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Nodes to the values that nothing reads after them; a value without a reader dies at once."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    dies: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        last = max(node.users, key=order.__getitem__, default=node)
        dies.setdefault(last, []).append(node)
    return dies


def _attend(args: tuple[Any, ...], lengths: tuple[int, ...]) -> Tensor:
    """camshaft.attention over a packed row: q, k, v [1, H, T, D], each sequence on its own. Returns [1, T, H, V]."""
    q, k, v, *rest = args
    attention = ops.DEFINITIONS[ATTENTION]
    if len(set(lengths)) == 1:
        batch = [x.unflatten(2, (len(lengths), -1)).squeeze(0).transpose(0, 1) for x in (q, k, v)]
        return attention(*batch, *rest).flatten(0, 1)[None]
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([attention(*part, *rest) for part in parts], dim=1)
