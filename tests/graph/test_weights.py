"""Weights: lazy, by reference, and remade from recipes."""

from __future__ import annotations

import json

import pytest
import torch
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import quantize_weight
from camshaft.graph.weights import (
    QuantizedParts,
    Weight,
    WeightMap,
    concatenate,
    from_recipe,
    from_recipes,
)

FP8 = LinearFormat.parse("fp8/fp8")


def _counting(tensor: torch.Tensor) -> tuple[Weight, list[int]]:
    reads: list[int] = []

    def load() -> torch.Tensor:
        reads.append(1)
        return tensor

    return Weight(tuple(tensor.shape), tensor.dtype, load), reads


def test_by_reference() -> None:
    tensor = torch.nn.Parameter(torch.randn(2, 3))
    weight = Weight.from_tensor(tensor)
    assert weight.load().data_ptr() == tensor.data_ptr()
    assert not weight.load().requires_grad
    assert weight.num_bytes == 24


def test_nothing_is_read_before_it_is_asked_for() -> None:
    weight, reads = _counting(torch.randn(2, 3))
    made = concatenate([weight.cast(torch.bfloat16).transpose(), weight.cast(torch.bfloat16).transpose()])
    assert (made.shape, made.dtype, reads) == ((6, 2), torch.bfloat16, [])
    made.load()
    assert len(reads) == 2


def test_recipes() -> None:
    sources = {name: Weight.from_tensor(torch.randn(2, 3)).named(name) for name in "ab"}
    made = concatenate([sources["a"].transpose(), sources["b"].transpose()]).cast(torch.float16)
    recipe = json.loads(json.dumps(made.recipe))
    assert recipe == {
        "cast": {"concatenate": [{"transpose": {"source": "a"}}, {"transpose": {"source": "b"}}], "dim": 0}, "dtype": "float16",
    }  # fmt: skip
    again = from_recipe(recipe, sources)
    assert (again.shape, again.dtype) == (made.shape, made.dtype)
    assert torch.equal(again.load(), made.load())


def test_missing_source() -> None:
    with pytest.raises(KeyError, match="c"):
        from_recipe({"transpose": {"source": "c"}}, {})


def test_constants_have_no_recipe() -> None:
    constant, named = Weight.from_tensor(torch.ones(2, 2)), Weight.from_tensor(torch.ones(2, 2)).named("a")
    assert concatenate([constant, named]).recipe is None
    assert constant.transpose().recipe is None
    assert constant.cast(torch.float32) is constant


def test_concatenate_other_dimension() -> None:
    parts = [torch.randn(2, n) for n in (1, 3)]
    assert torch.equal(concatenate([Weight.from_tensor(p) for p in parts], 1).load(), torch.cat(parts, 1))


def test_map() -> None:
    weights = WeightMap({"a": Weight.from_tensor(torch.ones(2))})
    copy = weights.copy()
    assert [copy.add("a", Weight.from_tensor(torch.ones(3))) for _ in range(2)] == ["a_1", "a_2"]
    assert list(weights) == ["a"]
    assert list(copy.only({"a_2"})) == ["a_2"]
    assert copy.num_bytes == 8 + 12 + 12


def test_rows_quantized_are_read_once_for_both_parts() -> None:
    tensor = torch.randn(6, 32) * torch.tensor([[0.0], [1e-3], [1.0], [10.0], [1e4], [2.0]])
    weight, reads = _counting(tensor)
    rows = QuantizedParts(weight.named("a"), FP8, candidates=8)
    values, scale = rows.part("values"), rows.part("scale")
    assert (values.shape, values.dtype, scale.shape, scale.dtype) == ((6, 32), torch.float8_e4m3fn, (6,), torch.float32)
    assert (values.num_bytes, scale.num_bytes, reads) == (192, 24, [])
    read = [values.load(), scale.load()]
    assert len(reads) == 1
    assert torch.equal(scale.to(torch.device("cpu")), read[1]) and len(reads) == 2
    assert torch.equal(values.load().float(), read[0].float()) and len(reads) == 2
    restored = read[0].float() * read[1][:, None]
    assert (restored - tensor).abs().max(dim=1).values.le(tensor.abs().amax(1) / 16).all()
    largest = read[0].float().abs().amax(1)
    assert largest[0] == 0 and largest[1:].ge(208).all() and largest.le(448).all()


def test_scales_are_chosen_for_the_least_error() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(64, 256)
    stored = quantize_weight(tensor, FP8, candidates=8)
    values, scale = stored.values, stored.scale
    plain, plain_scale = torch.ops.camshaft.quantize_rows(tensor)
    chosen = (values.float() * scale[:, None] - tensor).square().sum(1)
    first = (plain.float() * plain_scale - tensor).square().sum(1)
    assert (chosen <= first).all() and chosen.sum() < 0.9 * first.sum()


def test_quantizing_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 16, dtype=torch.bfloat16)
    whole = quantize_weight(tensor, FP8, candidates=8)
    monkeypatch.setattr("camshaft.graph.quant_formats._CHUNK_ELEMENTS", 40)
    pieces = quantize_weight(tensor, FP8, candidates=8)
    assert torch.equal(pieces.values.view(torch.uint8), whole.values.view(torch.uint8))
    assert torch.equal(pieces.scale, whole.scale)


def test_recipes_of_quantized_rows_share_their_source() -> None:
    weight, reads = _counting(torch.randn(4, 16))
    joined = concatenate([weight.named("a"), weight.named("a")]).cast(torch.bfloat16)
    rows = QuantizedParts(joined, FP8, candidates=8)
    recipes = {f"w.{part}": rows.part(part).recipe or {} for part in rows.shapes}
    assert recipes["w.scale"]["part"] == "scale"
    again = from_recipes(json.loads(json.dumps(recipes)), {"a": weight})
    assert torch.equal(again["w.values"].load().float(), rows.part("values").load().float())
    assert torch.equal(again["w.scale"].load(), rows.part("scale").load())
    assert len(reads) == 4


def test_parts_are_moved_before_they_are_joined() -> None:
    parts = [Weight.from_tensor(torch.randn(2, 3)) for _ in range(2)]
    made = concatenate(parts).cast(torch.bfloat16).transpose()
    assert made.to(torch.device("meta")).is_meta
    assert torch.equal(made.to(torch.device("cpu")), made.load())
