"""When FlashAttention is taken: installed, as expected, and not switched off."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from camshaft.export.kernels import flash


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    flash.forward.cache_clear()
    yield
    flash.forward.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """A package whose forward function is `function`."""
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd = function  # type: ignore[attr-defined]
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def forward(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any, max_seqlen_q: Any,
    max_seqlen_k: Any, softmax_scale: Any, causal: Any, window_size_left: Any, out: Any,
) -> None:  # fmt: skip
    """Arguments as the package's function has them."""


def test_it_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, forward)
    assert flash.forward() is forward


def test_it_is_left_alone_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    assert flash.forward() is None
    assert flash.why_not_flash(q, q, q, softcap=0.0, sinks=None, alibi=None) == "FlashAttention is not installed"


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, forward)
    monkeypatch.setenv(flash.SWITCH, "0")
    assert flash.forward() is None


def test_another_release_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    install(monkeypatch, lambda q, k, v, out: None)
    with caplog.at_level(logging.WARNING):
        assert flash.forward() is None
    assert "no arguments causal, cu_seqlens_k" in caplog.text


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    install(monkeypatch, forward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    with caplog.at_level(logging.WARNING):
        assert flash.forward() is None
    assert "camshaft[flash-attention] installs the right package" in caplog.text


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"softcap": 3.0}, "soft caps"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"alibi": torch.zeros(2)}, "ALiBi"),
        ({"dtype": torch.float32}, "16 bits"),
        ({"dim": 20}, "multiples of 8"),
        ({}, "compute capabilities"),
    ],
)
def test_what_it_does_not_serve(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, forward)
    q = torch.zeros(1, 2, change.pop("dim", 64), dtype=change.pop("dtype", torch.bfloat16))
    assert reason in flash.why_not_flash(q, q, q, **{"softcap": 0.0, "sinks": None, "alibi": None, **change})
