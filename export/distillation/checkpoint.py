"""The model that is distilled: its own weights by name, as masters that are trained, and the checkpoint that they become."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...graph.program import Program
from ...graph.weights import Recipe as WeightRecipe
from ...models.huggingface import ModelSource
from ..artifact import atomic_directory

FACTS_FILE = "distillation.json"
"""What a distilled checkpoint says of its making."""
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".index.json", ".md", ".py")
"""Ends of the names of a model directory's files that are weights, or speak of the weights as they were."""


def load_transformers(source: ModelSource, model: Any) -> Any:
    """The Transformers model behind a source, in the dtypes of its checkpoint, on the CPU; one in memory is copied.

    Raises ValueError for a model that is not made of a Transformers checkpoint, or of a quantized one.
    """
    if source.quantized is not None:
        raise ValueError(
            f"{source.name} is quantized already ({source.quantized}); distillation begins with the unquantized model, which is "
            "the teacher"
        )
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).cpu().eval().requires_grad_(False)
    if source.tokenizer_dir is None:
        raise ValueError(
            f"distillation takes a Hugging Face directory, a hub id or a Transformers model, not {type(model).__name__}"
        )
    from transformers import AutoModelForCausalLM

    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    return load(source.tokenizer_dir, dtype="auto").eval().requires_grad_(False)


@dataclass(frozen=True)
class Parameters:
    """A model's own weights on a device, by every name that a program's recipes use.

    teacher: float32 or as stored, never changed. student: the same but for the masters in `trained`, float32 with gradients, by the
    one name of each that Transformers has. stored: dtype that each is written in, by all names.
    """

    teacher: Mapping[str, Tensor]
    student: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    stored: Mapping[str, torch.dtype]


def read_parameters(model: Any, program: Program, device: torch.device) -> Parameters:
    """The weights of a Transformers model that a program reads; floating-point parameters are trained, tied ones once.

    Raises ValueError for weights that are not made of the model's own by joining, transposing and casting.
    """
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    teacher: dict[str, Tensor] = {}
    student: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    fixed: dict[int, Tensor] = {}
    for name in _source_names(program):
        tensor = held[name]
        if id(tensor) not in fixed:
            wide = tensor.detach().to(device)
            fixed[id(tensor)] = wide.float() if wide.is_floating_point() else wide
        teacher[name] = student[name] = fixed[id(tensor)]
        one_name = first_name.get(id(tensor))
        if one_name is not None and tensor.is_floating_point():
            if one_name not in trained:
                trained[one_name] = teacher[name].clone().requires_grad_()
            student[name] = trained[one_name]
    return Parameters(teacher, student, trained, {name: held[name].dtype for name in student})


def _source_names(program: Program) -> list[str]:
    names: dict[str, None] = {}
    for _, spec in program.placeholders("weight"):
        recipe = program.weights[spec.key].recipe
        names.update(dict.fromkeys(() if recipe is None else _sources(recipe, spec.key)))
    return list(names)


def _sources(recipe: WeightRecipe, key: str) -> Iterator[str]:
    if "source" in recipe:
        yield recipe["source"]
        return
    known = [recipe[kind] for kind in ("cast", "transpose") if kind in recipe] or recipe.get("concatenate")
    if known is None:
        raise ValueError(f"{key} is made by {', '.join(recipe)}, through which nothing can be trained")
    for part in known:
        yield from _sources(part, key)


def write_checkpoint(
    output: Path,
    model: Any,
    trained: Mapping[str, Tensor],
    stored: Mapping[str, torch.dtype],
    tokenizer_dir: Path | None,
    facts: Mapping[str, Any],
) -> None:
    """Writes a Hugging Face directory, whole or not at all: the model with its trained weights, the tokenizer, and `facts`.

    model: the Transformers model, whose parameters are replaced. stored: dtypes of all its parameters.
    """
    for name, parameter in model.named_parameters():
        parameter.data = trained.get(name, parameter).detach().to("cpu", stored[name])
    with atomic_directory(output, overwrite=True) as work:
        model.save_pretrained(work)
        for file in sorted(tokenizer_dir.iterdir()) if tokenizer_dir is not None else ():
            if file.is_file() and not file.name.endswith(_NOT_COPIED) and not (work / file.name).exists():
                shutil.copyfile(file, work / file.name)
        (work / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def check_output(output: Path) -> None:
    """Raises ValueError for a directory that is not empty, or a file."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is no empty directory; give a new one, or empty it")
