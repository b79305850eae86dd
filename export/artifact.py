"""The artifact on disk: written whole or not at all, checked before it is used.

ENGINE/manifest.json            versions, hardware, build, passes, sha256 of every other file
ENGINE/plan.json                the graphs of all segments, and the steps
ENGINE/engines/SEGMENT.EXT      one small engine per distinct segment
ENGINE/weights-00001.safetensors ...
ENGINE/tokenizer/...            tokenizer.json, tokenizer_config.json, chat_template.jinja
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.weights import FileRange, Weight
from .engine import Engine
from .manifest import Manifest, hardware_of
from .segment import Plan
from .targets.base import LoweringError, get_target

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
"""Size from which a new weights file is begun, in bytes."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)

_ST_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def is_artifact(path: str | Path) -> bool:
    """Whether a path is the directory of a saved engine."""
    return (Path(path) / "manifest.json").is_file() and (Path(path) / "plan.json").is_file()


# --------------------------------------------------------------------------------------------------------------- writing
@contextmanager
def atomic_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new directory that takes the place of `path` when the block ends well, and vanishes when it does not.

    Also removes what killed writers left beside `path`.
    """
    path = path.absolute()
    if path.exists() and not (overwrite and (is_artifact(path) or not any(path.iterdir()))):
        kind = (
            "an engine; pass overwrite=True to replace it" if is_artifact(path) else "not an engine; give another path"
        )
        raise ValueError(f"{path} exists and is {kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        pid = stale.name.split(".")[-2]
        if not pid.isdigit() or not _alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    work = path.parent / f".{path.name}.{os.getpid()}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        if path.exists():
            old = path.parent / f".{path.name}.old.{os.getpid()}.partial"
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_safetensors(path: Path, weights: Mapping[str, Weight]) -> None:
    """Writes weights to one safetensors file, reading one at a time. Raises ValueError if one has not its declared shape."""
    header: dict[str, Any] = {}
    offset = 0
    for name, weight in weights.items():
        header[name] = {
            "dtype": _ST_DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.num_bytes],
        }
        offset += weight.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, weight in weights.items():
            tensor = weight.load()
            if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
                raise ValueError(
                    f"weight {name!r} was read as {list(tensor.shape)} {tensor.dtype}, "
                    f"declared as {list(weight.shape)} {weight.dtype}"
                )
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _shards(weights: Mapping[str, Weight]) -> Iterator[dict[str, Weight]]:
    shard: dict[str, Weight] = {}
    size = 0
    for name, weight in weights.items():
        if shard and size + weight.num_bytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = weight
        size += weight.num_bytes
    yield shard


def save_engine(engine: Engine, path: Path, *, overwrite: bool) -> Path:
    """Writes an engine; see `Engine.save`."""
    with atomic_directory(path, overwrite=overwrite) as work:
        (work / "plan.json").write_text(json.dumps(engine.plan.to_json(), separators=(",", ":")))
        (work / "engines").mkdir()
        for file in engine.manifest.engine_files:
            shutil.copyfile(engine.engine_dir / file, work / "engines" / file)
        if "tensorrt" in engine.manifest.targets:
            from .targets.tensorrt import KERNELS, kernels_of

            kernels = kernels_of(engine.engine_dir)
            if kernels is not None:
                (work / "engines" / KERNELS).write_bytes(kernels)
            elif (engine.engine_dir / KERNELS).is_file():
                shutil.copyfile(engine.engine_dir / KERNELS, work / "engines" / KERNELS)
        if engine.tokenizer_path is not None:
            copy_tokenizer(engine.tokenizer_path, work / "tokenizer")
        placed: dict[str, str] = {}
        used = {name: engine.weights[name] for name in engine.plan.weight_names}
        for index, shard in enumerate(_shards(used), start=1):
            file = f"weights-{index:05d}.safetensors"
            write_safetensors(work / file, shard)
            placed.update(dict.fromkeys(shard, file))
        manifest = dataclasses.replace(engine.manifest, weights=placed, files=_file_table(work))
        (work / "manifest.json").write_text(manifest.to_json())
    return path


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies the tokenizer files that exist; a tokenizer without tokenizer.json is converted by Transformers."""
    destination.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    if not (destination / "tokenizer.json").is_file() and any(
        (source / n).is_file() for n in ("tokenizer.model", "vocab.json", "spiece.model")
    ):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, use_fast=True).save_pretrained(destination)
    if not any(destination.iterdir()):
        destination.rmdir()


def _file_table(work: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in work.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    return {
        str(path.relative_to(work)): {"sha256": digest, "bytes": path.stat().st_size}
        for path, digest in zip(files, digests)
    }


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------------- reading
def load_engine(
    path: str | Path, *, max_sequences: int | None = None, verify: bool = True, rebuild: bool = False
) -> Engine:
    """Opens a saved engine.

    max_sequences: a smaller limit than the engine was built for. verify: compare every file with its sha256 (sizes are
    always compared). rebuild: lower the segments again for this machine, from the graphs in the artifact, instead of using
    its engines. Raises ValueError for a directory that is no engine, a damaged file, a newer format, or other hardware or
    package versions than the engine needs; the message names the fix.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"there is no engine directory {path}; build one with camshaft.compile(...).save(path) or `camshaft build`"
        )
    if not (path / "manifest.json").is_file():
        raise ValueError(
            f"{path} has no manifest.json; it is no Camshaft engine (a Hugging Face model is compiled with camshaft.compile)"
        )
    manifest = Manifest.from_json((path / "manifest.json").read_text(), path / "manifest.json")
    _check_files(path, manifest, verify)
    if not rebuild:
        check_fit(manifest)
    if max_sequences is not None:
        if not 0 < max_sequences <= manifest.build.max_sequences:
            raise ValueError(
                f"max_sequences is {max_sequences}; allowed: 1 to {manifest.build.max_sequences}, what the engine was built for"
            )
        manifest = dataclasses.replace(manifest, build=dataclasses.replace(manifest.build, max_sequences=max_sequences))
    if not rebuild and "tensorrt" in manifest.targets:
        from .targets.tensorrt import check_engines

        names = [file.file for file in manifest.engines if file.target == "tensorrt"]
        try:
            check_engines(path / "engines", names)
        except LoweringError as error:
            raise ValueError(f"the engine at {path} does not fit: {error}") from error
    plan = Plan.from_json(json.loads((path / "plan.json").read_text()))
    weights = _stored_weights(path, manifest)
    tokenizer = path / "tokenizer"
    engine = Engine(manifest, plan, weights, path / "engines", tokenizer if tokenizer.is_dir() else None)
    if rebuild:
        from .lower import relower

        relower(engine)
    return engine


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, facts = item
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if verify and file_digest(file) != facts["sha256"]:
            return f"{name} does not have the sha256 that the manifest names"
        return None

    for name in (
        "plan.json",
        *set(manifest.weights.values()),
        *(f"engines/{file}" for file in manifest.engine_files),
    ):
        if name not in manifest.files:
            raise ValueError(
                f"{path}/manifest.json does not list {name}; it is damaged: build or copy the engine again"
            )
    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(check, manifest.files.items()) if problem is not None]
    if problems:
        raise ValueError(
            f"the engine at {path} is damaged: {'; '.join(problems[:3])}. Copy it again, or build it again"
        )


def check_fit(manifest: Manifest) -> None:
    """Raises ValueError where this machine or its packages do not run the engine."""
    build = manifest.build
    fix = "build it again here, or load it with rebuild=True, which lowers it again from its own graphs"
    if build.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the engine was built for {manifest.hardware.get('name', 'a GPU')}, and torch sees no CUDA device here: "
            "compile the model again for the CPU, with camshaft.compile(model, device='cpu')"
        )
    device = torch.device(build.device)
    for name in manifest.targets:
        reason = get_target(name).unavailable(device)
        if reason is not None:
            raise ValueError(f"the engine's target {name} cannot run here: {reason}")
    if "inductor" in manifest.targets:
        here = hardware_of(device)
        for key in ("machine", "capability"):
            if manifest.hardware.get(key) != here.get(key):
                raise ValueError(
                    f"the engine was built for {key} {manifest.hardware.get(key)}, this machine has {here.get(key)}: {fix}"
                )
    for name in manifest.targets:
        exact = get_target(name).versions() if name in ("inductor", "tensorrt") else {}
        for package, version in exact.items():
            if manifest.versions.get(package) != version:
                raise ValueError(
                    f"the engine was built with {package} {manifest.versions.get(package)}, here is {version}: {fix}"
                )


def _stored_weights(path: Path, manifest: Manifest) -> dict[str, Weight]:
    from safetensors import SafetensorError, safe_open

    handles: dict[str, Any] = {}
    begins: dict[str, dict[str, int]] = {}
    weights: dict[str, Weight] = {}
    by_name = {text: dtype for dtype, text in _ST_DTYPES.items()}
    for name, file in manifest.weights.items():
        try:
            if file not in handles:
                handles[file] = safe_open(path / file, framework="pt")
                begins[file] = tensor_offsets(path / file)
            part = handles[file].get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"the engine at {path} is damaged: {file}: {error}. Copy it again, or build it again"
            ) from error

        def load(file: str = file, name: str = name) -> Tensor:
            return handles[file].get_tensor(name)

        weights[name] = Weight(
            tuple(part.get_shape()),
            by_name[part.get_dtype()],
            load,
            stored_at=FileRange(path / file, begins[file][name]),
        )
    return weights


def tensor_offsets(file: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a whole safetensors file (its header has been checked)."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
