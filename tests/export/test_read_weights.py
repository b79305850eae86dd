"""Weights that are read from their files by several threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from camshaft.export import read_weights
from camshaft.export.artifact import tensor_offsets, write_safetensors
from camshaft.graph.weights import FileRange, Weight
from torch import Tensor


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(37, 50, generator=generator),
        "halves": torch.randn(9, 7, generator=generator).bfloat16(),
        "small": torch.randn(5, 5, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.arange(11) % 3 == 0,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    write_safetensors(tmp_path / "w.safetensors", {name: Weight.from_tensor(value) for name, value in tensors.items()})
    return tmp_path / "w.safetensors"


def placed(file: Path, tensors: dict[str, Tensor]) -> dict[str, Weight]:
    """The weights of a file, by where their bytes are."""
    begins = tensor_offsets(file)
    return {
        name: replace(Weight.from_tensor(value), stored_at=FileRange(file, begins[name]))
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("piece", [16, 4096, 1 << 20])
def test_every_byte_arrives(
    file: Path, tensors: dict[str, Tensor], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_weights, "_PIECE_BYTES", piece)
    found = {name: torch.empty_like(value) for name, value in tensors.items()}
    read_weights.fill(found, placed(file, tensors))
    for name, value in tensors.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


def test_a_file_that_ends_within_a_tensor(file: Path, tensors: dict[str, Tensor]) -> None:
    weights = placed(file, tensors)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"w.safetensors ends at byte \d+, within a tensor; copy the engine again"):
        read_weights.fill({name: torch.empty_like(value) for name, value in tensors.items()}, weights)


def test_on_a_cpu_weights_stay_where_they_are(file: Path, tensors: dict[str, Tensor]) -> None:
    weights = placed(file, tensors)
    found = read_weights.weights_on(weights, torch.device("cpu"))
    assert all(found[name].data_ptr() == tensors[name].data_ptr() for name in tensors)
