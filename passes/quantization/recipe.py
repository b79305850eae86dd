"""Recipes: which linear layers are quantized, to what, and by which algorithm.

A recipe has a name ("int4_awq"), or is made of fields. As plain data (`to_json`, `from_json`) it is part of a build's key and
manifest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from ...graph.linear_format import LinearFormat

Algorithm = Literal["round", "awq", "gptq", "smoothquant"]
KVCache = Literal["auto", "fp8", "int8"]
ActOrder = Literal["none", "static", "gather"]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
KV_CACHES: tuple[KVCache, ...] = get_args(KVCache)
ACT_ORDERS: tuple[ActOrder, ...] = get_args(ActOrder)
_BUDGETS = ("max_bits", "max_error", "max_activation_bits")
HEAD = "lm_head"
ROUTER = "router"
ROLES = (HEAD, ROUTER)
"""Entries of `Recipe.skip` that name what a layer does, found in the graph, whatever its weight is called."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model's linear layers are quantized. Raises ValueError for values that are not allowed or do not go together."""

    format: LinearFormat | None
    """Of every layer that nothing below says otherwise of; None: layers stay as they are."""
    algorithm: Algorithm = "round"
    """How values are found: "round" to nearest; "awq" (Lin et al. 2023), "gptq" (Frantar et al. 2022) and "smoothquant" (Xiao et
    al. 2022) need calibration data."""
    kv_cache: KVCache = "auto"
    """What keys and values are stored as, where a build is not told otherwise."""
    overrides: tuple[tuple[str, Recipe | None], ...] = ()
    """(pattern of weight names, recipe or None: as it is); the first pattern that fits counts."""
    skip: tuple[str, ...] = ROLES
    """Layers that stay as they are: patterns of weight names, "lm_head" (what makes the logits), "router" (what feeds a choice)."""
    candidates: int = 8
    """Scales that are tried for each row, group or block; 1: the one that max-abs gives."""
    dequantize: bool = False
    """Where a target has no kernel for the format: weights in the compute dtype, made when they are loaded; activations stay."""
    max_bits: float | None = None
    """Mixed precision: bits of a weight on average, at most; the format of each layer is chosen by its sensitivity."""
    max_error: float | None = None
    """Mixed precision: as small as possible with at most this KL divergence to the unquantized model, nats per token."""
    max_activation_bits: float | None = None
    """Mixed precision: bits of a number of the inputs, on average over the products' multiplications, at most; every layer gets
    `format` or one of `alternatives`."""
    alternatives: tuple[LinearFormat, ...] = ()
    """Mixed precision: formats to choose from besides `format`; leaving a layer as it is is another (not for
    `max_activation_bits`)."""
    smoothing: float = 0.5
    """SmoothQuant: share of the activations' range that moves into the weights, 0 to 1 (alpha, section 4)."""
    awq_grid: int = 20
    """AWQ: exponents that are tried for a layer's channel factors."""
    gptq_block: int = 128
    """GPTQ: columns between updates of all columns behind them."""
    gptq_damp: float = 0.01
    """GPTQ: share of the Hessian's mean diagonal that is added to its diagonal."""
    gptq_correct: bool = True
    """GPTQ: weights are first fitted to the outputs of the unquantized model, which is run beside the quantized one."""
    gptq_sweeps: int = 0
    """GPTQ: sweeps of coordinate descent over all groups, or columns, behind it, with scales fitted to the values after each."""
    act_order: ActOrder = "none"
    """GPTQ: "static": columns are rounded in the order of falling activations, groups stay as they are; "gather": they are stored
    so, groups of alike columns, and the input is gathered in each step."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("algorithm", self.algorithm, ALGORITHMS),
            ("kv_cache", self.kv_cache, KV_CACHES),
            ("act_order", self.act_order, ACT_ORDERS),
        ):
            if value not in allowed:
                raise ValueError(f"recipe: {name} is {value!r}; allowed: {', '.join(allowed)}")
        for name, number, low, high in (
            ("candidates", self.candidates, 1, 256),
            ("smoothing", self.smoothing, 0, 1),
            ("awq_grid", self.awq_grid, 1, 1000),
            ("gptq_block", self.gptq_block, 1, 1 << 20),
            ("gptq_damp", self.gptq_damp, 0, 10),
            ("gptq_sweeps", self.gptq_sweeps, 0, 100),
        ):
            if not low <= number <= high:
                raise ValueError(f"recipe: {name} is {number}; allowed: {low} to {high}")
        budgets = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"recipe: {' and '.join(budgets)} are given; one budget at a time")
        for pattern, override in self.overrides:
            if override is not None and override.overrides:
                raise ValueError(f"recipe: the override {pattern!r} has overrides itself; give them in one list")

    @classmethod
    def named(cls, name: str, *, group: int | None = None) -> Recipe:
        """A recipe by name; `group`: another length of groups along K. Raises ValueError, with all names, for an unknown one."""
        if name not in RECIPES:
            raise ValueError(f"quantize is {name!r}; allowed: {', '.join(map(repr, RECIPES))}, a Recipe, or None")
        recipe = RECIPES[name]
        return recipe if group is None else recipe.with_group(group)

    def with_group(self, group: int) -> Recipe:
        """The same with groups of another length along K. Raises ValueError where the format has one length alone."""
        if self.format is None or self.format.block or self.format.group == -1:
            raise ValueError(f"group is {group}, and {self.format} has no groups along K; leave it out")
        return dataclasses.replace(self, format=dataclasses.replace(self.format, group=group))

    @property
    def mixed(self) -> bool:
        """Whether layers get their formats under a budget."""
        return any(getattr(self, name) is not None for name in _BUDGETS)

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        if self.mixed:
            return True
        members = (self, *(override for _, override in self.overrides if override is not None))
        return any(
            member.format is not None and (member.algorithm != "round" or member.format.activations.endswith("_static"))
            for member in members
        )

    @property
    def formats(self) -> tuple[LinearFormat, ...]:
        """Every format that a layer may get, each once."""
        members = (self, *(override for _, override in self.overrides if override is not None))
        found = [member.format for member in members if member.format is not None]
        return tuple(dict.fromkeys((*found, *self.alternatives)))

    def for_layer(self, names: tuple[str, ...]) -> Recipe | None:
        """The recipe of a layer whose weight has these names (a joined one has several); None: it stays as it is."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip if pattern not in ROLES for name in names):
            return None
        for pattern, override in self.overrides:
            if any(fnmatchcase(name, pattern) for name in names):
                return override
        return self

    def to_json(self) -> dict[str, Any]:
        """As plain data: what differs from the defaults."""
        data: dict[str, Any] = {"format": None if self.format is None else str(self.format)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "format" or value == field.default:
                continue
            if field.name == "overrides":
                value = [[pattern, None if recipe is None else recipe.to_json()] for pattern, recipe in value]
            elif field.name == "alternatives":
                value = [str(format) for format in value]
            data[field.name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """What `to_json` wrote. Raises ValueError for unknown fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"recipe has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        values = dict(data)
        values["format"] = None if data.get("format") is None else LinearFormat.parse(data["format"])
        if "overrides" in data:
            values["overrides"] = tuple(
                (pattern, None if recipe is None else cls.from_json(recipe)) for pattern, recipe in data["overrides"]
            )
        if "alternatives" in data:
            values["alternatives"] = tuple(map(LinearFormat.parse, data["alternatives"]))
        if "skip" in data:
            values["skip"] = tuple(data["skip"])
        return cls(**values)


def _recipe(text: str, **options: Any) -> Recipe:
    return Recipe(format=LinearFormat.parse(text), **options)


def _gptq(text: str) -> Recipe:
    """GPTQ to four bits. Stronger damping than the paper's 1% keeps weights from fitting the calibration tokens too closely."""
    return _recipe(text, algorithm="gptq", gptq_damp=0.05, gptq_sweeps=1)


RECIPES: dict[str, Recipe] = {
    "fp8": _recipe("fp8/fp8"),
    "fp8_lm_head": _recipe("fp8/fp8", skip=(ROUTER,)),
    "fp8_static": _recipe("fp8:tensor/fp8_static"),
    "fp8_block": _recipe("fp8:block128/fp8_block"),
    "fp8_gptq": _recipe("fp8/fp8", algorithm="gptq", act_order="static", gptq_sweeps=4),
    "fp8_weight_only": _recipe("fp8/none"),
    "int8": _recipe("int8/int8"),
    "int8_smoothquant": _recipe("int8/int8", algorithm="smoothquant"),
    "int8_weight_only": _recipe("int8/none"),
    "int4": _recipe("int4:g128/none"),
    "int4_awq": _recipe("int4:g128:zp/none", algorithm="awq"),
    "int4_gptq": _gptq("int4:g32:zp/none"),
    "w4a8": _recipe("int4:g128/fp8"),
    "nvfp4": _recipe("nvfp4/nvfp4"),
    "nvfp4_search": _recipe("nvfp4/nvfp4_search"),
    "nvfp4_gptq": _gptq("nvfp4/nvfp4"),
    "nvfp4_fp8_gptq": _gptq("nvfp4/fp8"),
    "nvfp4_weight_only": _recipe("nvfp4/none"),
    "nvfp4_weight_only_gptq": _gptq("nvfp4/none"),
    "mxfp4": _recipe("mxfp4/mxfp4"),
    "mxfp4_weight_only": _recipe("mxfp4/none"),
    "mxfp8": _recipe("mxfp8/mxfp8"),
}
"""Recipes by name."""
