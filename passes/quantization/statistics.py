"""Statistics of a layer's inputs over the calibration tokens: collected once, saved to a safetensors file, and used again.

    amax [K]        largest absolute value of each channel                      scales of activations, SmoothQuant
    mean_abs [K]    mean absolute value of each channel                         AWQ
    moment [K, K]   mean of x x^T (GPTQ's Hessian, up to a factor of 2)         AWQ's search, GPTQ, sensitivity; in files if asked

The file's metadata say which model and tokens they are of; a file of others is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_KIND = "camshaft-calibration-statistics"


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw of one layer's input x [tokens, K]: float32 tensors, and how many tokens."""

    num_tokens: int
    amax: Tensor
    mean_abs: Tensor
    moment: Tensor | None = None

    @classmethod
    def of(cls, chunks: Iterable[Tensor], *, moment: bool = False) -> InputStatistics:
        """Of x in pieces [T, K] of any float dtype. moment: also the second moments. Raises ValueError for no tokens."""
        amax = total = second = None
        num_tokens = 0
        for x in chunks:
            wide = x.float()
            absolute = wide.abs()
            if amax is None or total is None:
                amax, total = absolute.amax(0), absolute.sum(0)
            else:
                torch.maximum(amax, absolute.amax(0), out=amax)
                total += absolute.sum(0)
            if moment:
                if second is None:
                    second = torch.zeros((wide.shape[1],) * 2, device=wide.device)
                second.addmm_(wide.t(), wide)
            num_tokens += wide.shape[0]
        if amax is None or total is None or not num_tokens:
            raise ValueError("statistics of no tokens; give calibration text")
        if second is not None:
            second /= num_tokens
        return cls(num_tokens, amax, total / num_tokens, second)

    def scaled(self, factor_K: Tensor) -> InputStatistics:
        """The statistics of x * factor, factor positive."""
        moment = None if self.moment is None else self.moment * factor_K[:, None] * factor_K
        return InputStatistics(self.num_tokens, self.amax * factor_K, self.mean_abs * factor_K, moment)

    def to(self, device: torch.device) -> InputStatistics:
        """The same on a device."""
        moment = None if self.moment is None else self.moment.to(device)
        return InputStatistics(self.num_tokens, self.amax.to(device), self.mean_abs.to(device), moment)

    def require_moment(self, name: str) -> Tensor:
        """The second moments [K, K]; raises ValueError where they were not kept."""
        if self.moment is None:
            raise ValueError(f"the statistics of {name} hold no second moments; collect them with moments")
        return self.moment


def static_scale(statistics: InputStatistics, limit: float) -> Tensor:
    """The static scale [] (float32) of a layer's input: its max-abs over `limit` (448 for fp8, 127 for int8)."""
    return (statistics.amax.amax() / limit).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class SavedStatistics:
    """What a file of statistics holds: of layers by the keys of their weights. It stands in for calibration data."""

    layers: Mapping[str, InputStatistics]

    def digest(self) -> str:
        """16 hex digits that change with any number."""
        state = hashlib.sha256()
        for name, found in sorted(self.layers.items()):
            state.update(f"{name} {found.num_tokens}".encode())
            for tensor in (found.amax, found.mean_abs, found.moment):
                state.update(b"-" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:16]


def save_statistics(
    path: Path | str, statistics: Mapping[str, InputStatistics], *, model: str, data_digest: str, moments: bool = False
) -> None:
    """Writes statistics by layer name (the key of its weight). moments: with the [K, K] ones, which take most of the room."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, found in statistics.items():
        tensors[f"{name}.num_tokens"] = torch.tensor(found.num_tokens)
        tensors[f"{name}.amax"] = found.amax.cpu().contiguous()
        tensors[f"{name}.mean_abs"] = found.mean_abs.cpu().contiguous()
        if moments and found.moment is not None:
            tensors[f"{name}.moment"] = found.moment.cpu().contiguous()
    save_file(tensors, str(path), metadata={"kind": _KIND, "model": model, "data": data_digest})


def load_statistics(
    path: Path | str, *, model: str | None = None, data_digest: str | None = None
) -> dict[str, InputStatistics]:
    """Reads what `save_statistics` wrote. model, data_digest: what they must be of; None: anything.

    Raises ValueError for a file of another kind, model or text.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != _KIND:
            raise ValueError(f"{path} holds no calibration statistics; write them with save_statistics")
        for what, wanted, found in (
            ("model", model, metadata.get("model")),
            ("data", data_digest, metadata.get("data")),
        ):
            if wanted is not None and wanted != found:
                raise ValueError(f"{path} is of {what} {found!r}, not {wanted!r}; calibrate again")
        keys = set(file.keys())
        names = sorted(key.removesuffix(".num_tokens") for key in keys if key.endswith(".num_tokens"))
        return {
            name: InputStatistics(
                int(file.get_tensor(f"{name}.num_tokens")),
                file.get_tensor(f"{name}.amax"),
                file.get_tensor(f"{name}.mean_abs"),
                file.get_tensor(f"{name}.moment") if f"{name}.moment" in keys else None,
            )
            for name in names
        }
