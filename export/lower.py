"""Lowering: every distinct segment of a plan becomes an engine file, in parallel where the target compiles for long."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .manifest import hardware_of
from .segment import Plan, Segment
from .targets.base import get_target

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


def lower_plan(
    plan: Plan,
    target_name: str,
    device: torch.device,
    directory: Path,
    max_tokens: int,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Lowers the segments into `directory` and returns segment id -> file name. Raises LoweringError."""
    target = get_target(target_name)
    directory.mkdir(parents=True, exist_ok=True)
    segments = [segment for segment in plan.segments.values() if not segment.eager and target.extension]
    names = {segment.id: f"{segment.id}.{target.extension}" for segment in segments}
    workers = min(len(segments), (os.cpu_count() or 1) // 2)
    done = 0
    if target.name == "inductor" and device.type == "cpu" and workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            jobs = {pool.submit(_lower_one, target_name, s, str(device), max_tokens): s for s in segments}
            for job in as_completed(jobs):
                (directory / names[jobs[job].id]).write_bytes(job.result())
                done += 1
                _tell(progress, done, len(segments))
    else:
        for segment in segments:
            start = time.perf_counter()
            (directory / names[segment.id]).write_bytes(target.lower(segment, device, max_tokens))
            logger.debug("segment %s lowered in %.2f s", segment.id, time.perf_counter() - start)
            done += 1
            _tell(progress, done, len(segments))
    return names


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress("lowering segments", done, total)


def _lower_one(target_name: str, segment: Segment, device: str, max_tokens: int) -> bytes:
    return get_target(target_name).lower(segment, torch.device(device), max_tokens)


def relower(engine: Engine) -> None:
    """Lowers an engine's segments again for this machine; its files stay as they are.

    A target or device that is not here is replaced by the default one, which is logged.
    """
    build = engine.manifest.build
    device = torch.device(build.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the engine holds {build.dtype} weights for a GPU and torch sees none; compile the checkpoint for the CPU, "
            "with camshaft.compile(model, device='cpu')"
        )
    target = build.target
    reason = get_target(target).unavailable(device)
    if reason is not None:
        logger.warning("target %s cannot run here (%s); the engine is rebuilt for eager", target, reason)
        target = "eager"
    directory = Path(tempfile.mkdtemp(prefix="camshaft-engines-"))
    engines = lower_plan(engine.plan, target, device, directory, build.max_batch_tokens)
    engine.engine_dir = directory
    engine.remove_with_engine(directory)
    versions = {**engine.manifest.versions, **get_target(target).versions()}
    engine.manifest = dataclasses.replace(
        engine.manifest,
        engines=engines,
        build=dataclasses.replace(build, target=target),
        hardware=hardware_of(device),
        versions=versions,
    )
    engine._target = get_target(target)
