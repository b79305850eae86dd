"""match_attention: attention that a model writes out in its own module becomes camshaft::attention.

    before (Bloom, Falcon, GPT-J, CodeGen, MPT, GPT-Neo)                       after
    s = baddbmm(alibi, q, k^T) / matmul(q, k^T) / d + bias ...                 o = camshaft.attention(q, k, v, None, None,
    p = softmax(s + mask);  o = matmul(p, v)                                       slopes, scale, window, 0.0)

What stands between the product and the softmax is not matched by shape but probed: that part of the graph is run on small
numbers, with the product replaced by constants. It is attention if the result is scale * product + bias, and the bias is
minus infinity outside a causal mask (or a causal window) and slope * (j - i) + a constant per row inside (ALiBi, Press
et al. 2022). Anything else stays as it is, and `verify` names it. Numerics: reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.program import Program
from ..graph.weights import Weight
from .base import GraphPass, Stage, only_user
from .match import CASTS, COPIES, VIEWS, aten, call, is_call, static, value
from .resolve_masks import ATTENTION

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_BOUNDS = (
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.gt.Scalar,
    aten.ge.Scalar,
    aten.sub.Tensor,
    aten.add.Tensor,
    aten.sub.Scalar,
    aten.add.Scalar,
    aten.tril.default,
    aten.triu.default,
)
_PROBE_TOKENS = 64
_SHORTEST = 4
_MOST_TOKENS = 4096
_MOST_ELEMENTS = 1 << 24
_HIDDEN = -1e4


@dataclass(frozen=True)
class _Form:
    """What probing found: scores are scale * (q k^T) with a causal window and ALiBi slopes [H] (None: no ALiBi)."""

    scale: float
    window: int
    slopes: Tensor | None


class MatchAttention(GraphPass):
    """Recognises written-out causal attention by probing what lies between its two matrix products."""

    name = "match_attention"
    stage = Stage.CANONICALIZE
    numerics = "reordered"

    def run(self, program: Program) -> int:
        matches = 0
        for node in list(program.graph.nodes):
            if is_call(node, *_SOFTMAX):
                matches += _match(program, node)
            elif is_call(node, aten.scaled_dot_product_attention.default):
                matches += _match_sdpa(program, node)
        return matches


def _match_sdpa(program: Program, node: fx.Node) -> int:
    args = [*node.args, *[None] * (6 - len(node.args))]
    q, k, v, mask = args[:4]
    dropout = args[4] if args[4] is not None else node.kwargs.get("dropout_p", 0.0)
    mask = mask if mask is not None else node.kwargs.get("attn_mask")
    is_causal = args[5] if args[5] is not None else node.kwargs.get("is_causal", False)
    if dropout or not _square(q, k, v):
        return 0
    scale = float(node.kwargs.get("scale") or value(q).shape[-1] ** -0.5)
    if mask is None:
        form = _Form(scale, 0, None) if is_causal else None
    else:
        form = _probe_mask(program, mask, value(q).shape[2], int(value(q).shape[1]), scale)
    if form is None:
        return 0
    with program.graph.inserting_before(node):
        slopes = _add_slopes(program, form.slopes) if form.slopes is not None else None
        out = call(program, ATTENTION, q, k, v, None, None, slopes, form.scale, form.window, 0.0)
        out = call(program, aten.transpose.int, out, 1, 2)
    node.replace_all_uses_with(out)
    return 1


def _square(q: Any, k: Any, v: Any) -> bool:
    """Whether q [B, H, T, D], k [B, G, T, D], v [B, G, T, V] are attention of a row over itself, H a multiple of G."""
    if not all(isinstance(x, fx.Node) and value(x).dim() == 4 for x in (q, k, v)):
        return False
    shapes = [value(x).shape for x in (q, k, v)]
    if len({str(shape[0]) for shape in shapes}) > 1 or len({str(shape[2]) for shape in shapes}) > 1:
        return False
    heads = [static(shape[1]) for shape in shapes]
    return None not in heads and heads[1] == heads[2] and heads[0] % heads[1] == 0  # type: ignore[operator]


def _match(program: Program, softmax: fx.Node) -> int:
    found = _product_below(softmax.args[0])
    consumer = _consumer(softmax)
    if found is None or consumer is None:
        return 0
    product, q, k_transposed = found
    v = consumer.args[1]
    num_heads = value(product).shape[-3]
    if not isinstance(v, fx.Node) or static(num_heads) is None or value(product).dim() not in (3, 4):
        return 0
    if softmax.args[1] not in (-1, value(softmax).dim() - 1) or not _fits(product, q, k_transposed, v):
        return 0
    form = _probe(program, softmax.args[0], product, int(num_heads))
    if form is None:
        return 0
    with program.graph.inserting_before(consumer):
        q4 = q if value(q).dim() == 4 else call(program, aten.unsqueeze.default, q, 0)
        k = call(program, aten.transpose.int, k_transposed, -1, -2)
        k4 = k if value(k).dim() == 4 else call(program, aten.unsqueeze.default, k, 0)
        v4 = v if value(v).dim() == 4 else call(program, aten.unsqueeze.default, v, 0)
        slopes = _add_slopes(program, form.slopes) if form.slopes is not None else None
        out = call(program, ATTENTION, q4, k4, v4, None, None, slopes, form.scale, form.window, 0.0)
        out = call(program, aten.transpose.int, out, 1, 2)
        if value(consumer).dim() == 3:
            out = call(program, aten.squeeze.dim, out, 0)
        if value(out).dtype != value(consumer).dtype:
            out = call(program, aten._to_copy.default, out, dtype=value(consumer).dtype)
    consumer.replace_all_uses_with(out)
    return 1


def _fits(product: fx.Node, q: fx.Node, k_transposed: fx.Node, v: fx.Node) -> bool:
    """Whether the operands have the product's batch and heads: broadcast ones, and other keys than queries, do not match."""
    lead = [str(size) for size in value(product).shape[:-2]]
    same = all([str(size) for size in value(x).shape[:-2]] == lead for x in (q, k_transposed))
    rows = [[1, *value(x).shape[:-2]][-2:] for x in (q, v)]
    sizes = value(product).shape
    return same and str(rows[0]) == str(rows[1]) and str(sizes[-1]) == str(sizes[-2])


def _add_slopes(program: Program, slopes: Tensor) -> fx.Node:
    key = program.weights.add("alibi_slopes", Weight.from_tensor(slopes))
    return program.add_input("alibi_slopes", kind="weight", key=key, example=slopes)


def _consumer(softmax: fx.Node) -> fx.Node | None:
    """matmul(probabilities, v), through casts, copies and views of the probabilities."""
    node: fx.Node = softmax
    while True:
        user = only_user(node)
        if user is None:
            return None
        if is_call(user, aten.matmul.default, aten.bmm.default):
            return user if user.args[0] is node else None
        if not is_call(user, *CASTS, *COPIES, *VIEWS, aten.dropout.default):
            return None
        if is_call(user, aten.dropout.default) and user.args[2]:
            return None
        node = user


def _product_below(scores: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(product, q, k^T): the one product of two activations that the scores are computed from."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [scores]
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if len(seen) > 200:
            return None
        if is_call(node, *_PRODUCTS):
            found.append(node)
            if node.target is aten.baddbmm.default:
                stack.append(node.args[0])
            continue
        stack.extend(node.all_input_nodes)
    if len(found) != 1:
        return None
    product = found[0]
    q, k = product.args[1:3] if product.target is aten.baddbmm.default else product.args[:2]
    return (product, q, k) if isinstance(q, fx.Node) and isinstance(k, fx.Node) else None


def _lengths(program: Program, scores: Any, size: Any) -> list[int]:
    """Row lengths to probe: the fixed one; else a short one, and one beyond any window that the graph or a table hints at."""
    if isinstance(size, int):
        return [size] if size >= _SHORTEST else []
    if not size.node.expr.is_Symbol:
        return []
    hints: list[int] = []
    seen: set[fx.Node] = set()
    stack = [scores]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or is_call(node, *_PRODUCTS[:2]):
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        example = node.meta.get("val")
        if node.op == "placeholder" and isinstance(example, Tensor) and example.dtype in (torch.bool, torch.uint8):
            hints += [int(example.shape[-1])] if example.dim() > 1 else []
        elif is_call(node, *_BOUNDS):
            hints += [abs(arg) + 2 for arg in node.args if isinstance(arg, int)]
    longest = max(hints, default=0)
    if longest <= _PROBE_TOKENS:
        return [_PROBE_TOKENS]
    return [_PROBE_TOKENS, longest] if longest <= _MOST_TOKENS else []


def _evaluate(
    program: Program, scores: Any, product: fx.Node | None, size: Any, constant: float, heads: int, tokens: int
) -> Tensor | None:
    """The scores [heads, T, T] in float64 at one length, or None where they depend on inputs or on the row of a batch."""
    try:
        out = _Evaluator(program, product, constant, heads, tokens, size).evaluate(scores)
        if out is None or out.dim() not in (2, 3, 4):
            return None
        if out.dtype == torch.bool:
            out = torch.where(out, 0.0, float("-inf"))
        out = out.double()
        if out.dim() == 4 and product is not None and value(product).dim() == 3:
            out = out.reshape(-1, *out.shape[2:])
        if out.dim() == 4:
            if not bool((out == out[:1]).all()):
                return None
            out = out[0]
        return out.expand(heads, tokens, tokens)
    except (RuntimeError, IndexError, ValueError, TypeError):  # shapes that do not fit at this length, or with one head
        return None


def _probe(program: Program, scores: Any, product: fx.Node, num_heads: int) -> _Form | None:
    size = value(product).shape[-1]
    lengths = _lengths(program, scores, size)
    if not lengths:
        return None
    tokens = lengths[0]
    results = []
    for constant in (0.0, 1.0, 2.0):
        out = _heads_at(program, scores, product, size, constant, num_heads, tokens)
        if out is None:
            return None
        results.append(out)
    bias, one, two = results
    visible = bias[0] > _HIDDEN
    gain = (one - bias)[:, visible]
    scale = float(gain.mean())
    if not torch.allclose(gain, torch.full_like(gain, scale), rtol=1e-4, atol=1e-5):
        return None
    if not torch.allclose((two - bias)[:, visible], 2 * gain, rtol=1e-4, atol=1e-5):
        return None
    return _confirm(program, scores, product, size, num_heads, lengths, _read_bias(bias, _rounded(scale)))


def _probe_mask(program: Program, mask: Any, size: Any, num_heads: int, scale: float) -> _Form | None:
    lengths = _lengths(program, mask, size)
    bias = _heads_at(program, mask, None, size, 0.0, num_heads, lengths[0]) if lengths else None
    return _confirm(program, mask, None, size, num_heads, lengths, _read_bias(bias, scale))


def _heads_at(
    program: Program, scores: Any, product: fx.Node | None, size: Any, constant: float, num_heads: int, tokens: int
) -> Tensor | None:
    """The scores at a length; where all heads would take much memory, those of one head if the graph lets them."""
    if num_heads * tokens * tokens > _MOST_ELEMENTS:
        return _evaluate(program, scores, product, size, constant, 1, tokens)
    return _evaluate(program, scores, product, size, constant, num_heads, tokens)


def _confirm(
    program: Program,
    scores: Any,
    product: fx.Node | None,
    size: Any,
    num_heads: int,
    lengths: list[int],
    form: _Form | None,
) -> _Form | None:
    """The form at the longest length: a window longer than the short probe shows only there."""
    if form is None or len(lengths) == 1:
        return form
    bias = _evaluate(program, scores, product, size, 0.0, 1, lengths[1])
    if bias is None:
        bias = _heads_at(program, scores, product, size, 0.0, num_heads, lengths[1])
    longer = _read_bias(bias, form.scale)
    if longer is None or form.window not in (0, longer.window):
        return None
    return _Form(form.scale, longer.window, form.slopes)


def _read_bias(bias: Tensor | None, scale: float) -> _Form | None:
    """The form that a bias [H, T, T] has: causal, perhaps with a window, perhaps ALiBi; None for anything else."""
    if bias is None:
        return None
    tokens = bias.shape[-1]
    i = torch.arange(tokens)[:, None]
    j = torch.arange(tokens)[None, :]
    visible = bias > _HIDDEN
    if not bool((visible == visible[0]).all()):
        return None
    span = int((visible[0].sum(-1)).max())
    window = 0 if span == tokens else span
    expected = (j <= i) & (i - j < window) if window else j <= i
    if not bool((visible[0] == expected).all()):
        return None
    relative = bias - bias.diagonal(dim1=1, dim2=2)[:, :, None]
    slopes = relative[:, 1, 1] - relative[:, 1, 0]
    if not torch.allclose(relative[:, expected], (slopes[:, None, None] * (j - i))[:, expected], rtol=2e-2, atol=2e-2):
        return None
    return _Form(scale, window, slopes.float() if bool((slopes != 0).any()) else None)


def _rounded(scale: float) -> float:
    """The scale as the nearest short float: probing in fp32 leaves noise in the last digits."""
    return float(f"{scale:.7g}")


class _Evaluator:
    """Runs the part of a graph below `scores` on real numbers, with the product replaced by a constant."""

    def __init__(
        self, program: Program, product: fx.Node | None, constant: float, num_heads: int, tokens: int, size: Any
    ) -> None:
        self.program, self.product, self.tokens = program, product, tokens
        self.num_heads = num_heads
        self.constant = constant
        self.symbol = None if isinstance(size, int) else size.node.expr
        self.values: dict[fx.Node, Any] = {}

    def _size(self, size: Any) -> int:
        """A size at the probed length; other sizes that vary, such as the batch, are 2."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.xreplace({s: self.tokens if s == self.symbol else 2 for s in expression.free_symbols}))

    def evaluate(self, node: Any) -> Tensor | None:
        out = self._value(node)
        return out if isinstance(out, Tensor) else None

    def _value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in self.values:
            self.values[node] = self._compute(node)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node is self.product:
            return self._product()
        if is_call(node, aten.sym_size.int):
            return self._size(value(node.args[0]).shape[node.args[1]])
        spec = self.program.input_of(node)
        if spec is not None:
            return self.program.weights[spec.key].load().cpu() if spec.kind == "weight" else None
        inputs = fx.node.map_arg((node.args, node.kwargs), self._value)
        if any(self._value(n) is None for n in node.all_input_nodes):
            return None
        args, kwargs = inputs
        kwargs = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        return node.target(*args, **kwargs)

    def _product(self) -> Tensor | None:
        assert self.product is not None
        shape = [self._size(size) for size in value(self.product).shape]
        shape[-3] = self.num_heads
        ones = torch.full(shape, self.constant, dtype=torch.float32)
        if self.product.target is not aten.baddbmm.default:
            return ones
        base = self._value(self.product.args[0])
        if base is None:
            return None
        beta, alpha = self.product.kwargs.get("beta", 1.0), self.product.kwargs.get("alpha", 1.0)
        return beta * base + alpha * ones
