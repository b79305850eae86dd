"""`camshaft bench` on a small model with random weights: modes, suites, profiles, comparisons, reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from camshaft.cli.app import run

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 160, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
BUILD = (
    "--target", "eager", "--device", "cpu", "--max-seq-len", "96", "--max-batch-tokens", "64", "--max-sequences", "8",
)  # fmt: skip
SHORT = ("--num-requests", "4", "--input-len", "4:8", "--output-len", "6", "--repeat", "1", "--kv-cache-bytes", "1M")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """(config.json of a small model, environment with a build cache of its own)"""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMSHAFT_CACHE", str(folder / "cache"))
        yield str(folder / "config.json")


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_load_is_measured_on_random_weights(cli, shape):
    options = (*BUILD, *SHORT, "--load", "200,inf", "--slo", "ttft=100000", "--slo", "tpot=100000", "--json")
    code, text, _ = cli("bench", "run", "--random-weights", shape, *options)
    document = json.loads(text)
    assert code == 0 and document["model"]["name"] == "config (random weights)"
    assert [result["request_rate"] for result in document["results"]] == [200.0, "inf"]
    summary = document["results"][0]["summary"]
    assert summary["slo_share"]["median"] == 1 and summary["output_tokens"]["median"] == 24
    assert all(summary[f"{name}_ms_p99"]["median"] > 0 for name in ("ttft", "tpot", "itl", "e2e"))
    shape_facts = document["model"]["shape"]
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64
    assert shape_facts["linear_parameters"] == 2 * layer and shape_facts["head_parameters"] == 160 * 32
    assert shape_facts["kv_token_bytes"] == 2 * 2 * 16 * 4 and shape_facts["attention_width"] == 2 * 32
    assert shape_facts["step_weight_bytes"] == 4 * (2 * layer + 160 * 32 + 5 * 32 + 8)
    assert document["opened"]["build_s"] > 0 and document["results"][0]["start_up"]["prepare_s"] > 0


def test_a_suite_shares_one_engine(cli, shape, tmp_path):
    case = {"num_requests": 3, "input_len": 6, "output_len": 24, "repeats": 1, "kv_cache_bytes": 1 << 20}
    cases = [
        {"name": "all", **case, "profile_steps": 4},
        {"name": "few", **case, "max_sequences": 2},
        {"name": "one", **case, "mode": "latency"},
        {"name": "poisson", **case, "mode": "load", "rates": [100, 200]},
    ]
    (tmp_path / "suite.json").write_text(json.dumps({"cases": cases}))
    out = tmp_path / "out"
    command = ("bench", "run", "--random-weights", shape, *BUILD, "--save", tmp_path / "engine")
    code, text, err = cli(*command, "--suite", tmp_path / "suite.json", "--output", out)
    assert code == 0 and "ms per step" in text and "few, run 1" in err and "start-up: build" in text
    documents = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(documents) == {"all", "few", "one", "poisson"}
    assert documents["all"]["results"][0]["profile"]["num_steps"] == 4 and documents["all"]["case"] == "all"
    assert documents["few"]["results"][0]["limits"]["max_sequences"] == 2
    assert documents["one"]["results"][0]["summary"]["decode_tok_s"]["median"] > 0
    # the saved engine gives the same shape, and says how long it took to open
    code, text, _ = cli("bench", tmp_path / "engine", *SHORT, "--json")
    loaded = json.loads(text)
    assert (
        code == 0 and loaded["opened"]["load_s"] > 0 and loaded["model"]["shape"] == documents["all"]["model"]["shape"]
    )
    code, text, _ = cli("bench", "compare", *(out / f"{name}.json" for name in ("all", "few", "all")))
    assert code == 0 and "not alike" not in text
    code, _, err = cli("bench", "compare", out / "all.json", out / "poisson.json")
    assert code == 1 and "no system, mode and rate in common" in err
    code, _, _ = cli("bench", "report", *sorted(out.iterdir()), "-o", tmp_path / "pages" / "report.html")
    page = (tmp_path / "pages" / "report.html").read_text()
    assert code == 0 and page.startswith("<!DOCTYPE html>") and page.count("<svg") >= 6


def test_a_profile_keeps_its_trace(cli, shape, tmp_path):
    options = (*BUILD, *SHORT, "--profile", 3, "--trace", tmp_path / "trace.json", "--output", tmp_path / "run.json")
    code, text, _ = cli("bench", "run", "--random-weights", shape, *options)
    assert code == 0 and "Longest kernels" in text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert json.loads((tmp_path / "run.json").read_text())["results"][0]["profile"]["device"] == "cpu"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give an engine or a model, or --random-weights"),
        (["demo", "--random-weights", "llama-3.1-8b"], "one of the two"),
        (["--random-weights", "llama-9"], "no such shape"),
        (["demo", "--latency", "--load", "3"], "give one of the two"),
        (["demo", "--load", "x"], "--load is 'x'"),
        (["demo", "--slo", "ttft=3"], "objectives are for mode load"),
        (["demo", "--trace", "x"], "give --profile STEPS as well"),
        (["demo", "--load", "3", "--baseline", "transformers"], "--baseline goes with one case"),
        (["--random-weights", "llama-3.1-8b", "--baseline", "transformers"], "Transformers needs the model"),
        (["demo", "--buckets", "x"], "--buckets is 'x'"),
    ],
)
def test_what_cannot_be_measured_is_refused(cli, arguments, message):
    code, out, err = cli("bench", "run", *arguments)
    assert code == 1 and out == "" and message in " ".join(err.split()).replace("Give", "give")


def test_a_report_of_something_else_is_refused(cli, tmp_path):
    other = Path(tmp_path / "x.json")
    other.write_text("{}")
    code, _, err = cli("bench", "report", other, "-o", tmp_path / "r.html")
    assert code == 1 and "is no benchmark document" in err and not (tmp_path / "r.html").exists()
