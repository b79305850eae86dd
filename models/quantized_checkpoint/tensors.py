"""The tensors of a checkpoint as a scheme reads them: by name, each marked as used, and with the file it lies in for errors."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...graph.weights import Weight, make_weight

_CACHE_SCALE = re.compile(r"\.(k_scale|v_scale|q_scale|kv_scale|output_scale|k_zero_point|v_zero_point)$")


class Tensors(Mapping[str, Weight]):
    """Stored tensors by name, read lazily; `files` says where each lies.

    `take` and the functions built on it mark tensors as used; `unused` are the rest, which belong to the model as they are.
    """

    def __init__(self, tensors: Mapping[str, Weight], files: Mapping[str, Path]) -> None:
        self._tensors = dict(tensors)
        self._files = dict(files)
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Weight:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def modules(self, suffix: str) -> list[str]:
        """The modules that have a tensor `suffix`, in the checkpoint's order."""
        return [name.removesuffix(f".{suffix}") for name in self._tensors if name.endswith(f".{suffix}")]

    def where(self, name: str) -> str:
        """The file of a tensor, or of the first one of its module, for messages."""
        if name not in self._files:
            module = name.rpartition(".")[0] + "."
            name = next((other for other in self._files if other.startswith(module)), next(iter(self._files), name))
        return str(self._files.get(name, "the checkpoint"))

    def take(
        self,
        name: str,
        *,
        shape: tuple[int, ...] | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        meaning: str,
    ) -> Weight:
        """A tensor that must be there. Raises ValueError if it is missing or has another shape or dtype than allowed."""
        if name not in self._tensors:
            beside = [other for other in self._tensors if other.startswith(name.rpartition(".")[0] + ".")]
            raise ValueError(
                f"{self.where(name)} lacks tensor {name!r} ({meaning}); of its layer the checkpoint holds "
                f"{', '.join(sorted(beside)) or 'nothing'}: download it again, or quantize it again"
            )
        weight = self._tensors[name]
        if shape is not None and weight.shape != shape:
            raise ValueError(
                f"{self.where(name)}: {name!r} ({meaning}) has shape {list(weight.shape)}, allowed: {list(shape)}; "
                "the tensors of the layer and quantization_config do not belong together"
            )
        if dtypes is not None and weight.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{self.where(name)}: {name!r} ({meaning}) is {str(weight.dtype).removeprefix('torch.')}, allowed: {allowed}"
            )
        self._used.add(name)
        return weight

    def skip(self, name: str) -> None:
        """Marks a tensor as used that says nothing new, if it is there."""
        if name in self._tensors:
            self._used.add(name)

    def unused(self) -> dict[str, Weight]:
        """What no scheme took."""
        return {name: weight for name, weight in self._tensors.items() if name not in self._used}

    def cache_scales(self) -> list[str]:
        """Names of scales of a quantized KV cache that nobody took."""
        return [name for name in self._tensors if name not in self._used and _CACHE_SCALE.search(name)]


def as_float(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """Scales in float32, viewed as `shape`; a single one is spread over it."""
    count = math.prod(weight.shape)

    def make(parts: Iterator[Tensor]) -> Tensor:
        wide = next(parts).float()
        return wide.reshape(()).expand(shape).contiguous() if count == 1 else wide.reshape(shape).contiguous()

    return make_weight([weight], make, shape, torch.float32)


def inverse(weight: Weight) -> Weight:
    """float32 [] with 1 / the only value of `weight`."""
    return make_weight([weight], lambda parts: next(parts).float().reshape(()).reciprocal(), (), torch.float32)


def fingerprint(weight: Weight) -> str:
    """Identity of a small tensor's values; it is read for that."""
    data = weight.load().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
