"""A segment that Inductor compiled, as an archive of plain files: no pickle, no C++ linking.

segment.zip
  segment.py               the wrapper that Inductor wrote: it allocates, launches kernels, calls cuBLAS
  constants.safetensors    tensors that the graph itself holds, if any
  triton/HASH/NAME         Triton's cache entries of its kernels (cubin, JSON, ...), so that opening compiles nothing
  VARIANT/segment.py       of another form of the segment, with its own constants; the kernels of all lie together

Opened, the Triton entries are put into the machine's own Triton cache, where the kernels of `segment.py` are found; an entry that
does not fit there (another Triton, another GPU) is not found, and its kernel is compiled from the source that `segment.py` holds.
"""

from __future__ import annotations

import ast
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_SOURCE, _CONSTANTS, _TRITON = "segment.py", "constants.safetensors", "triton"
_DIRECTORY = b"@CAMSHAFT_TRITON_CACHE@"
"""Stands in stored JSON for the Triton cache directory, whose path Triton writes into it."""

ALIGNMENT = 16
"""Bytes to which compiled code takes its inputs to be aligned."""

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
"""Takes a list of all inputs, which it empties, and returns the outputs."""


def compile_archive(
    exported: torch.export.ExportedProgram,
    options: Mapping[str, Any] | None = None,
    variants: Mapping[str, torch.export.ExportedProgram] | None = None,
) -> bytes:
    """Compiles an exported segment, in this process, and returns the archive. Raises Inductor's errors.

    options: Inductor's. variants: other forms of the segment by name, with equal inputs.
    """
    from torch._inductor.utils import fresh_cache

    with tempfile.TemporaryDirectory(prefix="camshaft-inductor-") as directory, fresh_cache(dir=directory):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, form in {"": exported, **(variants or {})}.items():
                source, constants = _compile(form, options or {})
                archive.writestr(_member(name, _SOURCE), source)
                if constants:
                    archive.writestr(_member(name, _CONSTANTS), save_tensors(constants))
            cache = Path(os.environ["TRITON_CACHE_DIR"])
            for file in sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"):
                content = file.read_bytes()
                if file.suffix == ".json":
                    content = content.replace(str(cache).encode(), _DIRECTORY)
                archive.writestr(f"{_TRITON}/{file.relative_to(cache).as_posix()}", content)
    return buffer.getvalue()


def _member(variant: str, name: str) -> str:
    return f"{variant}/{name}" if variant else name


def _compile(exported: torch.export.ExportedProgram, options: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The wrapper's source and the constants that it takes before the segment's inputs, by position."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensor

    exported = exported.run_decompositions(select_decomp_table())
    graph_module = exported.graph_module
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
    constants = {
        f"{index:04d}": exported.constants[lifted[node.name]].contiguous()
        for index, node in enumerate(placeholders)
        if node.name in lifted
    }
    fake_mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    context = torch._guards.TracingContext(fake_mode)
    with _settings(options), V.set_fake_mode(fake_mode), torch._guards.tracing(context):
        joint_graph_passes(graph_module)
        compiled: Any = compile_fx_inner(graph_module, values, is_inference=True)
    if compiled.constants:
        raise RuntimeError(f"Inductor made constants of its own: {sorted(compiled.constants)}")
    return with_fewer_imports(compiled.source_code), constants


_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
"""Functions of torch that Inductor's `extern_kernels` holds under the same names."""


def with_fewer_imports(source: str) -> str:
    """The wrapper without imports of names that it never uses, and with torch's products instead of Inductor's names for them.

    Inductor writes the same imports everywhere; some load half of its compiler when a segment is opened.
    """
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    kernels = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "extern_kernels"
    }
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        names = {alias.asname or alias.name for alias in node.names}
        if not used & names:
            instead = "\n"
        elif names == {"extern_kernels"} and kernels <= _PRODUCTS:
            instead = "extern_kernels = torch\n"
        else:
            continue
        end = node.end_lineno or node.lineno
        lines[node.lineno - 1 : end] = [instead, *["\n"] * (end - node.lineno)]
    return "".join(lines)


@contextmanager
def _settings(options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inductor's settings: in this process, because worker processes take longer to start than the work lasts; no asserts.

    Sizes are checked when the batch is built; alignment when weights are bound and inputs are passed.
    """
    from torch._inductor import config

    fixed = {"compile_threads": 1, "fx_graph_cache": False, "size_asserts": False, "alignment_asserts": False}
    with config.patch({**fixed, **(options or {})}):
        yield


def variants_of(file: Path) -> frozenset[str]:
    """The names of an archive's variants. Raises OSError or ValueError for one that is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            return frozenset(
                name.removesuffix(f"/{_SOURCE}") for name in archive.namelist() if name.endswith(f"/{_SOURCE}")
            )
    except zipfile.BadZipFile as error:
        raise ValueError(f"not a whole archive of a compiled segment ({error})") from error


def calls(file: Path, name: str) -> bool:
    """Whether an archive's code names an operator, or one whose name begins so. Raises OSError or ValueError for a damaged one."""
    try:
        with zipfile.ZipFile(file) as archive:
            return name.encode() in archive.read(_SOURCE)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"not a whole archive of a compiled segment ({error})") from error


def open_archive(file: Path, device: torch.device, variant: str = "") -> Compiled:
    """Opens an archive and returns its function. Raises OSError, ValueError or RuntimeError for one that is damaged."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            source = archive.read(_member(variant, _SOURCE)).decode()
            stored = _member(variant, _CONSTANTS)
            constants = load_tensors(archive.read(stored)) if stored in names else {}
            _restore_kernels(archive, names, Path(triton_cache_dir(device.index or 0)))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"not a whole archive of a compiled segment ({error})") from error
    with _settings():
        module: ModuleType = PyCodeCache.load(source)
    before = [constants[key].to(device) for key in sorted(constants)]
    call: Compiled = module.call
    if not before:
        return call
    return lambda inputs: call([*before, *inputs])


def _restore_kernels(archive: zipfile.ZipFile, names: list[str], cache: Path) -> None:
    """Puts kernels that the Triton cache lacks into it, each whole or not at all."""
    kernels: dict[str, list[PurePosixPath]] = {}
    for path in (PurePosixPath(name) for name in names if name.startswith(f"{_TRITON}/")):
        if len(path.parts) != 3 or ".." in path.parts:
            raise ValueError(f"unexpected name {path}")
        kernels.setdefault(path.parts[1], []).append(path)
    for key, paths in kernels.items():
        if (cache / key).exists():
            continue
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".camshaft-", dir=cache))
        for path in paths:
            content = archive.read(str(path))
            if path.suffix == ".json":
                content = content.replace(_DIRECTORY, str(cache).encode())
            (work / path.name).write_bytes(content)
        try:
            work.rename(cache / key)
        except OSError:  # another process was quicker
            shutil.rmtree(work, ignore_errors=True)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as compiled code takes it: contiguous, at an aligned address; itself where it is so already."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
