"""The manifest: everything that an artifact says of itself, as JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..graph.program import CacheSpec, LayerCache, PassRecord

FORMAT_VERSION = 1
"""Version of the artifact's layout. A reader refuses a higher one."""
CACHE_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""What `kv_cache_dtype` may be, and the dtype of keys and values; None: the one they are computed in."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What an engine is built for. Changing any field needs a new build, apart from those that say otherwise."""

    target: str
    """Name of the target that runs the segments."""
    device: str
    """Kind of device: "cpu" or "cuda"."""
    dtype: str
    """Compute and weight dtype: "float32", "bfloat16" or "float16"."""
    max_seq_len: int
    """Most tokens of one sequence, prompt and output."""
    max_batch_tokens: int
    """Most tokens in one step."""
    max_sequences: int
    """Most sequences in one step (no new build: a smaller number can be given when an engine is loaded)."""
    block_size: int
    """Tokens in a KV block."""
    buckets: tuple[int, ...] = ()
    """Token counts that engines of fixed size are built for and CUDA graphs are captured for, ascending; () on the CPU."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities that TensorRT engines are built for, such as "8.9"; (): engines that run on any GPU."""
    quantize: str | dict[str, Any] | None = None
    """Recipe of linear layers: None as they are; a name ("fp8", "int4_awq") or the fields of one that has none."""
    calibration: str | None = None
    """Hex digits of the data that recipe and KV cache were calibrated on; None: they need none."""
    kv_cache_dtype: str = "auto"
    """What keys and values are stored as: "auto" the compute dtype, "fp8" float8_e4m3fn, "int8" with calibrated scales."""
    batch_invariant: bool = False
    """Whether a token's result must not depend, to the last bit, on what else is in its step; CUDA only."""
    hidden_layers: tuple[int, ...] = ()
    """Hidden states that steps give besides the logits, see `passes/capture_hidden.py`."""
    early_exit: int | None = None
    """Layers in front of the exit that drafts, see `passes/split_early_exit.py`; None: there is none."""
    exit_head: str | None = None
    """Hex digits of the exit's own norm and adapter; None: it uses the model's norm."""


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """A lowered segment in the engine directory."""

    segment: str
    """Id of the segment: the hash of its graph."""
    target: str
    """Which target made it and runs it."""
    file: str
    tokens: int | None = None
    """The only size that it takes (tokens, or rows of logits); None: any size."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the target tells of it, such as its layers by type and the seconds that it took to build."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What serving needs to know of the model."""

    name: str
    architecture: str
    model_type: str
    vocab_size: int
    """Width of the logits."""
    eos_token_ids: tuple[int, ...]
    max_positions: int | None
    """Longest sequence that the model knows, in tokens."""
    num_parameters: int
    hidden_size: int | None = None
    """Width of what the head reads, and of hidden states; None where no linear layer makes the logits."""
    hidden_input: int | None = None
    """Width of the hidden states that a step brings beside its tokens, `Batch.hidden`; None: it brings none."""
    config: dict[str, Any] = field(default_factory=dict)
    """The Hugging Face config, as it differs from the defaults."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    format_version: int
    camshaft_version: str
    versions: dict[str, str]
    hardware: dict[str, str]
    build: BuildConfig
    model: ModelFacts
    cache: CacheSpec
    passes: tuple[PassRecord, ...]
    report: tuple[str, ...]
    timings: dict[str, float]
    """Seconds of each phase of the build."""
    engines: tuple[EngineFile, ...]
    """The lowered segments, for targets that store any."""
    choices: tuple[dict[str, Any], ...] = ()
    """What `auto` measured: segment, tokens, ms per target, and the target that it chose."""
    weights: dict[str, str] = field(default_factory=dict)
    """Weight name -> safetensors file."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File -> {"sha256": hex digits, "bytes": size}."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets whose engines it holds; the build's target where there are none."""
        return tuple(dict.fromkeys(file.target for file in self.engines)) or (self.build.target,)

    def engines_of(self, segment: str) -> tuple[EngineFile, ...]:
        """The engine files of one segment, by size."""
        return tuple(
            sorted((file for file in self.engines if file.segment == segment), key=lambda file: file.tokens or 0)
        )

    @property
    def engine_files(self) -> tuple[str, ...]:
        """Names of the engine files, each once."""
        return tuple(dict.fromkeys(file.file for file in self.engines))

    def to_json(self) -> str:
        """The manifest as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=lambda value: str(value).removeprefix("torch."))

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Parses a manifest. Raises ValueError if it is damaged or of a newer format."""
        advice = "build or copy the engine again"
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not whole JSON ({error}); {advice}") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(version, int):
            raise ValueError(f"{where} has no format_version; it is no Camshaft engine, or damaged: {advice}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{where} has format {version}, this Camshaft reads up to {FORMAT_VERSION}; upgrade camshaft "
                f"(the engine was written by {data.get('camshaft_version', 'a newer version')}) or build it again here"
            )
        try:
            cache = data.pop("cache")
            layers = tuple(
                LayerCache(**{**layer, "dtype": getattr(torch, layer["dtype"])}) for layer in cache["layers"]
            )
            model = data.pop("model")
            build = data.pop("build")
            lists = {key: tuple(build.get(key, ())) for key in ("buckets", "capabilities", "hidden_layers")}
            return cls(
                build=BuildConfig(**{**build, **lists}),
                engines=tuple(EngineFile(**entry) for entry in data.pop("engines")),
                choices=tuple(data.pop("choices", ())),
                model=ModelFacts(**{**model, "eos_token_ids": tuple(model["eos_token_ids"])}),
                cache=CacheSpec(layers=layers, block_size=cache["block_size"]),
                passes=tuple(PassRecord(**record) for record in data.pop("passes")),
                report=tuple(data.pop("report")),
                **data,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}); {advice}") from error


def hardware_of(device: torch.device) -> dict[str, str]:
    """What an engine depends on: kind, name and compute capability of a GPU; machine and vector ISA of a CPU."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return {"device": "cuda", "name": "any GPU"}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": "cuda", "name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
    return {"device": "cpu", "machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
