"""Hugging Face decoders: a directory, a hub id or a model in memory becomes a Program.

The model is built with its parameters on the meta device and traced as it is; weights stay where they are and are read
one by one when an engine needs them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..graph.capture import CaptureError, capture
from ..graph.program import Program
from ..graph.weights import Weight
from . import attention
from .checkpoint import open_checkpoint
from .quantized_checkpoint.load import check_scheme
from .quantized_checkpoint.settings import read_settings
from .random_weights import RandomWeights
from .speculative.eagle_model import EagleModel

logger = logging.getLogger(__name__)

POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names under which a config keeps the longest sequence, in the order in which they are tried."""


@dataclass
class ModelSource:
    """A model before the trace: its class on the meta device, its weights, and what serving needs to know.

    max_positions: longest sequence that the model knows, in tokens, or None; eos_token_ids: ids that end a text;
    tokenizer_dir: a directory with tokenizer files, or None; quantized: the scheme of a checkpoint that is quantized, or None.
    hidden_input: width of hidden states that the model takes beside each token (its forward's `hidden` [1, T, H]), or None.
    """

    name: str
    model: nn.Module
    weights: dict[str, Weight]
    config: Any
    eos_token_ids: tuple[int, ...]
    max_positions: int | None
    tokenizer_dir: Path | None
    info: dict[str, Any] = field(default_factory=dict)
    quantized: str | None = None
    hidden_input: int | None = None


class _PackedRow(nn.Module):
    """Calls a decoder with one packed row: token_ids and positions [1, T] int64 -> logits [1, T, vocabulary]."""

    def __init__(self, model: nn.Module, by_position: bool) -> None:
        super().__init__()
        self.model = model
        self.by_position = by_position

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        extra = {"position_ids": positions} if self.by_position else {}
        return self.model(input_ids=token_ids, use_cache=False, **extra).logits


class _HiddenRow(nn.Module):
    """As `_PackedRow` for a model that reads hidden states [1, T, H], too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model(token_ids, positions, hidden)
        return logits


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While it is open, every parameter that a module registers goes to the meta device; buffers are computed as usual."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def open_model(model_or_path: Any, dtype: torch.dtype) -> ModelSource:
    """Opens a Hugging Face directory, hub id, `PreTrainedModel`, `RandomWeights` or `EagleModel`; weights take `dtype` where the
    model lets them.

    Raises ValueError for a directory without config or weights, an unknown architecture, or a checkpoint that does not fit.
    """
    if isinstance(model_or_path, nn.Module):
        return _from_module(model_or_path, dtype)
    if isinstance(model_or_path, (RandomWeights, EagleModel)):
        return model_or_path.open(dtype)
    return _from_directory(_local_directory(model_or_path), str(model_or_path), dtype)


def _local_directory(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; give the directory that holds config.json and *.safetensors")
    if str(path).count("/") > 1 or str(path).startswith((".", "/")):
        raise ValueError(
            f"there is no directory {path}; give a Hugging Face model directory or a hub id such as 'org/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{path!r} is neither a directory here nor a model that the hub gave ({type(error).__name__}); "
            "give an existing directory, or check the id and the network"
        ) from error


def _from_directory(directory: Path, name: str, dtype: torch.dtype) -> ModelSource:
    from transformers import AutoConfig, GenerationConfig

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json; it must be a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{directory}/config.json: {str(error).splitlines()[0]}") from error
    quantization = read_settings(directory)
    if quantization is not None:
        check_scheme(quantization)
        _forget_quantization(config)
    generation = None
    if (directory / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(directory)
    model = _meta_model(None, config, dtype)
    checkpoint = open_checkpoint(directory, model, quantization)
    source = _source(directory.name or name, model, checkpoint.weights, generation, directory)
    if quantization is not None:
        source.quantized = quantization.method
        source.info["notes"] = checkpoint.notes
    return source


def _forget_quantization(config: Any) -> None:
    """Makes the config that of the unquantized model: the graph is traced as if weights were dense."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)


def _from_module(module: nn.Module, dtype: torch.dtype) -> ModelSource:
    config: Any = copy.deepcopy(module.config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{type(module).__name__} in memory is quantized by Transformers; give the directory of its checkpoint instead"
        )
    model = _meta_model(type(module), config, dtype)
    held = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    weights = {}
    for key, value in model.state_dict().items():
        weights[key] = Weight.from_tensor(held[key]).cast(value.dtype)
    name = getattr(config, "_name_or_path", "") or config.model_type
    return _source(Path(name).name, model, weights, getattr(module, "generation_config", None), None)


def _source(
    name: str, model: nn.Module, weights: dict[str, Weight], generation: Any, directory: Path | None
) -> ModelSource:
    config: Any = model.config
    text = config.get_text_config()
    eos = getattr(generation, "eos_token_id", None)
    eos = eos if eos is not None else getattr(text, "eos_token_id", None)
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    limit = next((getattr(text, n) for n in POSITION_LIMITS if isinstance(getattr(text, n, None), int)), None)
    weights = {key: weight.named(key) for key, weight in weights.items()}
    info = {
        "architecture": type(model).__name__,
        "model_type": text.model_type,
        "vocab_size": text.vocab_size,
        "config": config.to_diff_dict(),
    }
    return ModelSource(name, model, weights, config, eos_ids, limit, directory, info)


def _meta_model(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with parameters on the meta device and real buffers, speaking Camshaft's operators where it can."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    attention.register()
    if model_class is None:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"architecture {config.model_type!r} is not a decoder that Transformers knows as a causal LM"
            )
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if model_class._can_set_attn_implementation():
        implementation = attention.NAME
    else:  # Falcon's ALiBi counts twice in "eager" (Transformers 5.17) and is right in "sdpa"
        implementation = "sdpa" if model_class._supports_sdpa else "eager"
    with parameters_on_meta():
        model = model_class._from_config(config, dtype=dtype, attn_implementation=implementation)
    model.tie_weights()
    if model._can_set_experts_implementation():
        model.set_experts_implementation(attention.NAME)
    attention.name_expert_gates(model)
    return model.eval()


def make_fake(module: nn.Module) -> FakeTensorMode:
    """Replaces every parameter and buffer by a fake CPU tensor, which has a shape and no storage; returns its mode.

    Fake CPU tensors rather than meta ones, because tensors that a model makes of Python lists while it runs keep values.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=False)
                owner._parameters[name] = parameters[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = fake(buffer)
    return mode


def _refuse_recurrent(name: str, model: Any) -> None:
    """Raises CaptureError for a model that keeps a state beside keys and values, naming the module that does."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    foreign = sorted(
        {kind for kind in layer_types if any(word in kind for word in ("linear", "recurrent", "mamba", "conv"))}
    )
    if not getattr(model, "_is_stateful", False) and not foreign:
        return
    mixers = [type(m).__name__ for m in model.modules() if any(isinstance(child, nn.Conv1d) for child in m.children())]
    what = mixers[0] if mixers else f"layers of type {foreign}" if foreign else type(model).__name__
    raise CaptureError(
        f"{name} cannot be served: {what} keeps a recurrent or convolution state beside keys and values, for which there is "
        "no cache yet; models of attention layers only can be taken"
    )


def trace_decoder(source: ModelSource) -> Program:
    """Traces a decoder: inputs token_ids and positions [1, T] int64, output logits [1, T, vocabulary]. Raises CaptureError.

    A model with `hidden_input` has a third input, hidden [1, T, H] in the dtype of its weights.
    """
    import inspect

    model: Any = source.model
    _refuse_recurrent(source.name, model)
    weights = dict(source.weights)
    for key, buffer in list(model.named_buffers(remove_duplicate=False)):
        if key not in model.state_dict() and buffer.device.type != "meta":  # computed, not stored: a constant
            weights[key] = Weight.from_tensor(buffer.clone())
    fake_mode = make_fake(model)
    by_position = "position_ids" in inspect.signature(model.forward).parameters
    # two tensors: torch.export takes one that is passed twice for one input
    examples = tuple(fake_mode.from_tensor(torch.zeros((1, 8), dtype=torch.int64)) for _ in range(2))
    num_tokens = torch.export.Dim("T", min=2, max=(source.max_positions or 1 << 20) - 1)
    row: nn.Module = _PackedRow(model, by_position)
    inputs: tuple[str, ...] = ("token_ids", "positions")
    if source.hidden_input is not None:
        row, inputs = _HiddenRow(model), (*inputs, "hidden")
        dtype = next(weight.dtype for weight in weights.values() if weight.dtype.is_floating_point)
        examples = (*examples, fake_mode.from_tensor(torch.zeros((1, 8, source.hidden_input), dtype=dtype)))
    uses_interface = model.config._attn_implementation == attention.NAME
    with nullcontext() if uses_interface else attention.symbolic_masks():
        program = capture(
            row,
            examples,
            dynamic_shapes={name: {1: num_tokens} for name in inputs},
            weights=weights,
            kind="decoder",
            name=source.name,
            token_inputs=inputs,
            prefix="model.",
        )
    program.info.update(source.info)
    return program
