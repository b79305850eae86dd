"""Weights that are read from their files onto a GPU.

pytest -m gpu tests/gpu/test_read_weights.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from camshaft.export.artifact import tensor_offsets, write_safetensors
from camshaft.export.read_weights import weights_on
from camshaft.graph.weights import FileRange, Weight

pytestmark = pytest.mark.gpu


def test_files_arrive_whole_beside_weights_in_memory(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    tensors = {f"w{i}": torch.randint(0, 256, (3, 4_000_001 + 7 * i), dtype=torch.uint8) for i in range(9)}
    tensors["scalar"] = torch.tensor(7, dtype=torch.uint8)
    file = tmp_path / "w.safetensors"
    write_safetensors(file, {name: Weight.from_tensor(value) for name, value in tensors.items()})
    begins = tensor_offsets(file)
    weights = {
        name: replace(Weight.from_tensor(torch.zeros_like(value)), stored_at=FileRange(file, begins[name]))
        for name, value in tensors.items()
    }
    weights["memory"] = Weight.from_tensor(torch.arange(5))
    found = weights_on(weights, device)
    assert list(found) == list(weights) and found["memory"].tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(found[name].cpu(), value) for name, value in tensors.items())
