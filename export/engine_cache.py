"""Built engines by what they were made of: a segment's graph, a size, versions. Any model with equal layers finds them.

$CAMSHAFT_CACHE or ~/.cache/camshaft
  engines/KEY.engine    KEY.json (details)     KEY: target, versions, segment, size, compute capabilities
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from .cache import cache_root, source_fingerprint
from .segment import Segment
from .targets.base import Built, LowerRequest


class EngineCache:
    """Engines of one target in one set of versions."""

    def __init__(self, target: str, versions: Mapping[str, str]) -> None:
        self._identity = [target, sorted(versions.items()), source_fingerprint()]

    def _path(self, segment: Segment, request: LowerRequest) -> Path:
        facts = [*self._identity, segment.id, sorted((request.sizes or {}).items()), list(request.capabilities)]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        return cache_root() / "engines" / key

    def find(self, segment: Segment, request: LowerRequest) -> Built | None:
        """A stored engine, or None."""
        path = self._path(segment, request)
        try:
            details = json.loads(path.with_suffix(".json").read_text())
            return Built(path.with_suffix(".engine").read_bytes(), {**details, "cached": True})
        except (OSError, json.JSONDecodeError):  # not there, or half-written by a killed process: built again
            return None

    def store(self, segment: Segment, request: LowerRequest, built: Built) -> None:
        """Keeps an engine; each file is whole or not there, the details come last."""
        path = self._path(segment, request)
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".engine", built.data), (".json", json.dumps(built.details).encode())):
            part = path.with_suffix(f"{suffix}.{os.getpid()}.{threading.get_ident()}")
            part.write_bytes(content)
            part.replace(path.with_suffix(suffix))
