"""Weights: lazy, by reference, and remade from recipes."""

from __future__ import annotations

import json

import pytest
import torch
from camshaft.graph.weights import Weight, WeightMap, concatenate, from_recipe


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
