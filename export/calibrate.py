"""Calibration statistics of a model in a file, for builds that come later and on machines that do not hold the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..models.huggingface import ModelSource, open_model, trace_decoder
from ..passes.manager import PassManager
from ..passes.pipeline import canonicalize_passes, fuse_passes
from ..passes.quantization.calibration import CalibrationData, linear_layers
from ..passes.quantization.calibrator import Calibrator
from ..passes.quantization.statistics import SavedStatistics, load_statistics, save_statistics
from . import cache
from .build import resolve_device, resolve_dtype
from .quantization import ReadCalibration
from .timer import Progress


def write_statistics(
    model: Any,
    path: Path,
    read: ReadCalibration,
    *,
    moments: bool,
    device: str | None,
    dtype: str | torch.dtype | None,
    progress: Progress | None = None,
) -> int:
    """Runs a model over calibration text and writes what its linear layers see; see `camshaft.calibrate`. Returns the tokens."""
    place = resolve_device(device)
    source = open_model(model, resolve_dtype(dtype, place))
    data = read(source)
    if not isinstance(data, CalibrationData):
        raise ValueError("calibration is a file of statistics already; give text or token ids")
    program = PassManager([*canonicalize_passes(), *fuse_passes()]).run(trace_decoder(source))
    told = None
    if progress is not None:
        report = progress

        def told(done: int, total: int, name: str) -> None:
            report(f"calibrating {name}", done, total)

    found = Calibrator(data, place, progress=told).collect(program, linear_layers(program), moments=moments)
    save_statistics(path, found, model=cache.weight_digest(source.weights), data_digest=data.digest(), moments=moments)
    return data.num_tokens


def read_statistics(path: Path, source: ModelSource) -> SavedStatistics:
    """What `write_statistics` wrote of this model. Raises ValueError for another file, or another model's."""
    return SavedStatistics(load_statistics(path, model=cache.weight_digest(source.weights)))
