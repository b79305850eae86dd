"""Draft checkpoints as they are published: a config.json beside safetensors, or beside a file of torch.save."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...graph.json_file import read_json_object


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of config.json. Raises ValueError where there is none, or it is damaged."""
    return read_json_object(
        directory / "config.json", fix="give the directory of a published checkpoint, or download it again"
    )


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU: of its safetensors files, else of its .bin or .pt files.

    Raises ValueError for a directory without any, or a damaged file.
    """
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return _read_safetensors(files)
    files = sorted((*directory.glob("*.bin"), *directory.glob("*.pt")))
    if not files:
        raise ValueError(f"{directory} holds no *.safetensors, *.bin or *.pt file; download the checkpoint again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is no file of tensors ({error}); download the checkpoint again") from error
        tensors |= {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    return tensors


def _read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); download it again") from error
    return tensors


def write_checkpoint(directory: Path, file: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes config.json and a safetensors file; floats are stored as bfloat16."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    stored = {
        name: value.detach().to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in tensors.items()
    }
    save_file(stored, directory / file, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")


def check_tensors(directory: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where a tensor is missing or of another shape than `expected`."""
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r} (it holds "
            f"{', '.join(sorted(tensors)[:4])} ...); give a checkpoint that goes with its config.json"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{directory}: {name} is {list(tensors[name].shape)}, and config.json makes it {list(shape)}; give a checkpoint "
                "that goes with its config.json"
            )
