"""Built engines and their measured times, by graph, size and versions: any model with equal layers finds them.

$CAMSHAFT_CACHE or ~/.cache/camshaft
  engines/KEY.engine    KEY.json (details)     KEY: target, versions, segment, size, compute capabilities
  measurements/KEY.json                        KEY: versions, GPU, segment, sizes
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cache import cache_root, source_fingerprint
from .segment import Segment
from .targets.base import Built, LowerRequest


class _Store:
    """Files under a key."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def path(self, facts: Sequence[Any]) -> Path:
        """Where the content of these facts lies, without extension."""
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        return cache_root() / self._folder / key

    @staticmethod
    def write(file: Path, content: bytes) -> None:
        """Writes a file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f"{file.suffix}.{os.getpid()}.{threading.get_ident()}")
        part.write_bytes(content)
        part.replace(file)


class MeasurementCache(_Store):
    """Milliseconds of a segment's engines on a GPU, by size and target.

    versions: of the packages that built them; gpu: its name.
    """

    def __init__(self, versions: Mapping[str, str], gpu: str) -> None:
        super().__init__("measurements")
        self._identity = [sorted(versions.items()), gpu, source_fingerprint()]

    def find(self, segment: Segment, sizes: Sequence[int | None]) -> dict[int | None, dict[str, float]] | None:
        """size -> {target: ms}, or None where it was not measured."""
        try:
            rows = json.loads(self.path([*self._identity, segment.id, list(sizes)]).with_suffix(".json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return {size: row for size, row in rows}

    def store(self, segment: Segment, times: Mapping[int | None, Mapping[str, float]]) -> None:
        """Keeps what was measured."""
        file = self.path([*self._identity, segment.id, list(times)]).with_suffix(".json")
        self.write(file, json.dumps(list(times.items())).encode())


class EngineCache(_Store):
    """Engines of one target in one set of versions."""

    def __init__(self, target: str, versions: Mapping[str, str]) -> None:
        super().__init__("engines")
        self._identity = [target, sorted(versions.items()), source_fingerprint()]

    def _path(self, segment: Segment, request: LowerRequest) -> Path:
        sizes = sorted((request.sizes or {}).items())
        return self.path([*self._identity, segment.id, sizes, list(request.capabilities)])

    def find(self, segment: Segment, request: LowerRequest) -> Built | None:
        """A stored engine, or None."""
        path = self._path(segment, request)
        try:
            details = json.loads(path.with_suffix(".json").read_text())
            return Built(path.with_suffix(".engine").read_bytes(), {**details, "cached": True})
        except (OSError, json.JSONDecodeError):  # not there, or half-written by a killed process: built again
            return None

    def store(self, segment: Segment, request: LowerRequest, built: Built) -> None:
        """Keeps an engine; the details come last."""
        path = self._path(segment, request)
        self.write(path.with_suffix(".engine"), built.data)
        self.write(path.with_suffix(".json"), json.dumps(built.details).encode())
