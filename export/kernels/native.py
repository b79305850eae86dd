"""Compiles a C file with the system's compiler on first use and keeps the library in a cache directory.

The library's name is a hash of everything it depends on (source, flags, compiler version, processor), so a change of
any of them compiles again, and machines of different kinds may share the directory. Two processes may compile at once:
each writes a temporary file and renames it, which is atomic.

OpenMP: torch brings its own libgomp. A second OpenMP runtime in the process would keep a second set of spinning
threads, so the library is linked against the runtime that is already loaded (found in /proc/self/maps), by its path:
the loader then resolves it, by its soname, to the copy in memory. GCC's code also runs on libomp and libiomp5, which
export GCC's entry points.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_COMMON = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_ATTEMPTS = (("-march=native", True), ("-mcpu=native", True), ("", True), ("-march=native", False), ("", False))
_TIMEOUT_S = 300


class NativeBuildError(RuntimeError):
    """The library could not be built or loaded; the message says what was tried, what happened and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class NativeLibrary:
    """A compiled library on disk."""

    path: Path
    """The shared library in the cache directory."""
    compiler: str
    """First line of `compiler --version`."""
    flags: tuple[str, ...]
    """The flags that worked."""
    openmp: str | None
    """Path of the OpenMP runtime it was linked against, "compiler default", or None: built without threads."""
    note: str
    """What an earlier, better set of flags failed with; empty where the first one worked."""


def cache_directory() -> Path:
    """Where compiled kernels are kept: $CAMSHAFT_CACHE/kernels, or ~/.cache/camshaft/kernels."""
    root = os.environ.get("CAMSHAFT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "camshaft") / "kernels"


def loaded_openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, torch's first; empty where /proc is missing."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    found = set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp)[^/\s]*\.so[^/\s]*)", maps))
    return sorted(found, key=lambda path: ("/torch" not in path, path))


def find_compiler() -> list[str]:
    """The C compiler's command: $CC where set (and then nothing else), or the first of cc, gcc, clang on the PATH.

    Raises:
        NativeBuildError: none is there.
    """
    chosen = os.environ.get("CC", "").strip()
    candidates = [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        path = shutil.which(command[0])
        if path:
            return [path, *command[1:]]
    if chosen:
        raise NativeBuildError(f"the C compiler CC={chosen!r} was not found; unset CC or point it to one")
    raise NativeBuildError("no C compiler found (looked for cc, gcc, clang on the PATH); install one or set CC")


def build_library(source: Path) -> NativeLibrary:
    """Compile `source` (one C file) to a shared library, or take it from the cache.

    Tries the processor's own instructions with OpenMP first, then without either; `note` keeps what failed.

    Raises:
        NativeBuildError: no compiler, no writable cache directory, or no set of flags compiles.
    """
    command = find_compiler()
    version = _run([*command, "--version"])
    text = _text(source)
    failures: list[str] = []
    for machine, threads in _ATTEMPTS:
        flags = (*_COMMON, machine) if machine else _COMMON
        link, openmp = _openmp_link(version) if threads else ((), None)
        identity = "\0".join([text, *command, *flags, str(threads), *link, version, _processor()])
        path = cache_directory() / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
        try:
            if not path.exists():
                _compile(command, source, path, flags, link, threads)
        except NativeBuildError as error:
            failures.append(str(error))
            continue
        shown = (*flags, *(("-fopenmp",) if threads else ()))
        first = version.splitlines()[0] if version else ""
        note = failures[0] if failures else ""
        return NativeLibrary(path=path, compiler=first, flags=shown, openmp=openmp, note=note)
    raise NativeBuildError(failures[0])


def _text(source: Path) -> str:
    """The source with that of the files beside it that it includes."""
    text = source.read_text()
    return "\0".join([text, *(_text(source.with_name(name)) for name in re.findall(r'#include "([^"]+)"', text))])


def _openmp_link(version: str) -> tuple[tuple[str, ...], str | None]:
    """Link flags for OpenMP and the runtime they name; clang's code does not run on libgomp."""
    clang = "clang" in version.lower()
    for path in loaded_openmp_runtimes():
        if not (clang and "libgomp" in path):
            return (path, f"-Wl,-rpath,{os.path.dirname(path)}"), path
    return ("-fopenmp",), "compiler default"


def _compile(
    command: list[str], source: Path, path: Path, flags: tuple[str, ...], link: tuple[str, ...], threads: bool
) -> None:
    """Compile and link in a temporary directory beside `path`, then rename. Two steps: -fopenmp at the link step would
    add the compiler's own OpenMP runtime."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            made, library = os.path.join(scratch, "kernel.o"), os.path.join(scratch, "kernel.so")
            _run([*command, *flags, *(("-fopenmp",) if threads else ()), "-c", str(source), "-o", made])
            _run([*command, "-shared", made, *link, "-pthread", "-lm", "-o", library])
            os.replace(library, path)
    except OSError as error:
        raise NativeBuildError(
            f"cannot write the kernel cache {path.parent}: {error}; set CAMSHAFT_CACHE to a writable directory"
        ) from error


def _run(command: list[str]) -> str:
    """Run a compiler command; its output, or NativeBuildError with its last lines."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"`{shlex.join(command)}` could not run: {error}") from error
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise NativeBuildError(f"`{shlex.join(command)}` failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


def _processor() -> str:
    """Architecture and instruction set flags: a library built with -march=native only fits these."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"
