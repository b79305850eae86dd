"""Lowering: every distinct segment of a plan becomes engine files, several at once where the target compiles for long."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .buckets import engine_sizes, varying_size
from .manifest import BuildConfig, EngineFile, hardware_of
from .segment import Plan, Segment
from .targets.base import Built, LowerRequest, Target, get_target
from .timer import Progress

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)


def lower_plan(
    plan: Plan,
    target_name: str,
    config: BuildConfig,
    directory: Path,
    progress: Progress | None = None,
    *,
    use_cache: bool = True,
) -> tuple[EngineFile, ...]:
    """Lowers the segments for `config` into `directory` and returns what is there.

    use_cache: engines of fixed sizes are taken from, and kept in, the cache of engines. Raises LoweringError.
    """
    target = get_target(target_name)
    directory.mkdir(parents=True, exist_ok=True)
    segments = [segment for segment in plan.segments.values() if not segment.eager and target.extension]
    jobs = [job for segment in segments for job in _jobs(segment, target, config)]
    files: dict[int, EngineFile] = {}
    for index, built in _build_all(target, jobs, use_cache):
        segment, request = jobs[index]
        size = next(iter(request.sizes.values()), None) if request.sizes else None
        name = f"{segment.id}{'' if size is None else f'-{size}'}.{target.extension}"
        (directory / name).write_bytes(built.data)
        files[index] = EngineFile(segment=segment.id, target=target.name, file=name, tokens=size, details=built.details)
        if progress is not None:
            progress(f"lowering segments ({target.name})", len(files), len(jobs))
    return tuple(files[index] for index in sorted(files))


def _jobs(segment: Segment, target: Target, config: BuildConfig) -> list[tuple[Segment, LowerRequest]]:
    request = LowerRequest(
        device=torch.device(config.device), max_tokens=config.max_batch_tokens, capabilities=config.capabilities,
        batch_invariant=config.batch_invariant,
    )  # fmt: skip
    symbol = varying_size(segment) if target.fixed_sizes else None
    if symbol is None:
        return [(segment, request)]
    return [(segment, dataclasses.replace(request, sizes={symbol: size})) for size in engine_sizes(config.buckets)]


def _build_all(
    target: Target, jobs: Sequence[tuple[Segment, LowerRequest]], use_cache: bool
) -> Iterator[tuple[int, Built]]:
    """(index of the job, what was built) as they are ready."""
    cache = None
    if target.fixed_sizes and use_cache:
        from .engine_cache import EngineCache

        versions = target.versions()
        if "tensorrt" in versions and torch.cuda.is_available():  # full TensorRT builds for the GPU that is here
            versions = {**versions, "gpu": torch.cuda.get_device_name()}
        cache = EngineCache(target.name, versions)
    missing = []
    for index, (segment, request) in enumerate(jobs):
        found = cache.find(segment, request) if cache is not None else None
        if found is not None:
            yield index, found
        else:
            missing.append(index)
    with contextlib.ExitStack() as stack:
        pool = _pool(target, jobs, len(missing))
        if pool is None:
            built = ((index, _lower_one(target.name, *jobs[index])) for index in missing)
        else:
            stack.enter_context(pool)
            futures = {pool.submit(_lower_one, target.name, *jobs[index]): index for index in missing}
            stack.callback(pool.shutdown, cancel_futures=True)  # after an error the rest is not begun
            built = ((futures[job], job.result()) for job in as_completed(futures))
        for index, result in built:
            if cache is not None:
                cache.store(*jobs[index], result)
            yield index, result


def _pool(target: Target, jobs: Sequence[tuple[Segment, LowerRequest]], count: int) -> Executor | None:
    """What the target wants for `count` builds, as far as there are cores: two for a process, which takes long to start."""
    workers = target.workers(jobs[0][1].device) if count > 1 else None
    cores = os.cpu_count() or 1
    if workers == "threads":
        return ThreadPoolExecutor(min(count, cores))
    if workers == "processes" and cores >= 4:
        return ProcessPoolExecutor(min(count, cores // 2), mp_context=multiprocessing.get_context("spawn"))
    return None


def _lower_one(target_name: str, segment: Segment, request: LowerRequest) -> Built:
    return get_target(target_name).lower(segment, request)


def relower(engine: Engine) -> None:
    """Lowers an engine's segments again for this machine; its files stay as they are.

    A target that is not here is replaced by the default one, which is logged.
    """
    build = engine.manifest.build
    device = torch.device(build.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the engine holds {build.dtype} weights for a GPU and torch sees none; compile the checkpoint for the CPU, "
            "with camshaft.compile(model, device='cpu')"
        )
    directory = Path(tempfile.mkdtemp(prefix="camshaft-engines-"))
    engine.remove_with_engine(directory)
    build = dataclasses.replace(build, capabilities=())  # for whatever GPU is here
    targets = []
    for name in engine.manifest.targets:
        reason = get_target(name).unavailable(device)
        if reason is None:
            targets.append(name)
        else:
            logger.warning("target %s cannot run here (%s); the engine is rebuilt without it", name, reason)
    whole = len(targets) == len(engine.manifest.targets)
    if not whole:
        build = dataclasses.replace(build, target=targets[0] if targets else _substitute(device))
        targets = [build.target]
    files: list[EngineFile] = []
    versions = dict(engine.manifest.versions)
    chosen = {(file.segment, file.target, file.tokens) for file in engine.manifest.engines}
    for name in targets:
        made = lower_plan(engine.plan, name, build, directory)
        keep_all = not whole or not chosen
        files += [file for file in made if keep_all or (file.segment, file.target, file.tokens) in chosen]
        versions |= get_target(name).versions()
    engine.engine_dir = directory
    engine.manifest = dataclasses.replace(
        engine.manifest,
        engines=tuple(files),
        build=build,
        hardware=hardware_of(device),
        versions=versions,
    )


def _substitute(device: torch.device) -> str:
    """The target that takes the place of one that is not here."""
    usable = device.type == "cuda" and get_target("inductor").unavailable(device) is None
    return "inductor" if usable else "eager"
