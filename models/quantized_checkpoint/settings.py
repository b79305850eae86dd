"""What a directory says about how its checkpoint is quantized: config.json, or ModelOpt's hf_quant_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...graph.json_file import read_json_object

_FIX = "give a checkpoint's directory, or download it again"


@dataclass(frozen=True)
class Settings:
    """quantization_config of a checkpoint. file: where it stands; facts: its fields."""

    file: Path
    facts: dict[str, Any]

    @property
    def method(self) -> str:
        """The scheme's name: `quant_method`."""
        return str(self.facts.get("quant_method") or "unnamed").lower()

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default` where it is missing or null."""
        value = self.facts.get(name)
        return default if value is None else value

    def one_of(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A field that must have one of a few values. Raises ValueError."""
        value = self.get(name, default)
        if isinstance(value, str):
            value = value.lower()
        if value not in allowed:
            raise self.error(f"{name} is {value!r}, allowed: {', '.join(map(repr, allowed))}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer field. Raises ValueError."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"{name} is {value!r}, allowed: an integer")
        return value

    def error(self, what: str) -> ValueError:
        """A ValueError that names the file and the scheme."""
        return ValueError(
            f"{self.file}: quantization_config of {self.method}: {what}; see docs/quantized-checkpoints.md"
        )


def read_settings(directory: Path) -> Settings | None:
    """How the checkpoint in `directory` is quantized; None if it is not.

    Raises ValueError where there is no config.json, or a file holds no JSON object.
    """
    file = directory / "config.json"
    config = read_json_object(file, fix=_FIX)
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and holder.get("quantization_config"):
            return Settings(file, dict(holder["quantization_config"]))
    if config.get("compression_config"):  # the field's former name in compressed-tensors
        return Settings(file, {"quant_method": "compressed-tensors", **config["compression_config"]})
    file = directory / "hf_quant_config.json"
    if file.is_file():
        facts = read_json_object(file, fix=_FIX).get("quantization") or {}
        if facts.get("quant_algo"):
            return Settings(file, {"quant_method": "modelopt", **facts})
    return None
