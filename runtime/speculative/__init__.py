"""Speculative decoding: several tokens for one pass over the weights, with the target model's own output.

    proposer.propose -> drafts -> one step of the target over [last token, drafts] -> acceptance -> proposer.observe

Importing this package imports no torch: names load on use. docs/speculative.md is the user's page.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "SpeculativeConfig": "config",
    "Proposer": "proposer",
    "ProposerContext": "proposer",
    "Target": "proposer",
    "Drafts": "proposer",
    "Verified": "proposer",
    "SpeculativeMetrics": "metrics",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
