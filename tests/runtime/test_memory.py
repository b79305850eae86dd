"""How the KV cache is sized, split and explained."""

import camshaft.runtime.memory as memory
import pytest
from camshaft.runtime.memory import format_bytes, host_memory, plan_cache

from .fake_engine import FakeEngine

GIB = 2**30


def plan(engine, **kwargs):
    return plan_cache(engine, **{"max_chunk_tokens": 16, **kwargs})


def test_bytes_are_split_by_what_a_full_request_needs():
    engine = FakeEngine(windows=(0, 9), max_seq_len=256, block_size=4)
    made = plan(engine, kv_cache_bytes=64 * (64 + 7) * 10)
    assert made.num_blocks == (640, 70), "64 blocks of full attention against 7 of a window of 9 with chunks of 16"
    assert made.ledger.kv_bytes == 64 * 710 and made.ledger.kv_tokens == 2560


def test_cpu_default_is_what_all_sequences_need_or_a_share_of_the_free(monkeypatch):
    engine = FakeEngine(max_sequences=8)
    monkeypatch.setattr(memory, "host_memory", lambda: (10 * GIB, 20 * GIB))
    assert plan(engine).num_blocks == (8 * 64,)
    monkeypatch.setattr(memory, "host_memory", lambda: (20_000, 20 * GIB))
    assert plan(engine).num_blocks == (int((0.4 * 20_000 - 1000) / 64),)


def test_gpu_share_counts_what_is_in_use(monkeypatch):
    engine = FakeEngine()
    engine.device = type("Device", (), {"type": "cuda", "__str__": lambda self: "cuda:0"})()
    engine.activation_bytes = lambda: 2 * GIB
    monkeypatch.setattr(memory, "device_memory", lambda device: (60 * GIB, 80 * GIB))
    made = plan(engine, memory_fraction=0.75, graph_bytes=GIB)
    assert made.ledger.kv_bytes == pytest.approx(37 * GIB, rel=1e-6)
    assert sum(size for name, size in made.ledger.rows() if name != "total") == 80 * GIB
    with pytest.raises(ValueError, match=r"memory_fraction=0.25 of 80.00 GiB, of which 20.00 GiB is in use"):
        plan(engine, memory_fraction=0.25)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kv_cache_bytes": 63}, "63 B .* not one block of 4 tokens in every cache group .64 B."),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes is 0; allowed: > 0"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5"),
        ({"memory_fraction": 0.5, "kv_cache_bytes": 5}, "give one of the two"),
        ({"kv_cache_bytes": 2**60}, "does not fit the .* that are free"),
    ],
)
def test_errors_give_numbers_and_the_fix(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan(FakeEngine(), **kwargs)


def test_host_memory_respects_the_control_group(tmp_path):
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal: 8000 kB\nMemFree: 1 kB\nMemAvailable: 6000 kB\nHugePages_Total: 0\n")
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    assert host_memory(proc, (files,)) == (6000 * 1024, 8000 * 1024)
    for name, text in zip(("max", "current", "stat"), ("4096000\n", "3000000\n", "anon 5\ninactive_file 500000\n")):
        (tmp_path / name).write_text(text)
    assert host_memory(proc, (files,)) == (1_596_000, 4_096_000)
    (tmp_path / "max").write_text("max\n")
    assert host_memory(proc, (files,)) == (6000 * 1024, 8000 * 1024)
    with pytest.raises(ValueError, match="pass kv_cache_bytes"):
        host_memory(tmp_path / "none", (files,))
    assert host_memory()[0] > 0


def test_ledger_reads_well():
    ledger = plan(FakeEngine(), kv_cache_bytes=64 * 100).ledger
    assert "KV cache        6.25 KiB" in str(ledger) and "holds 400 tokens" in str(ledger)
    assert "<table>" in ledger._repr_html_()
    assert [format_bytes(n) for n in (1, 1536, 3 * GIB)] == ["1 B", "1.50 KiB", "3.00 GiB"]
