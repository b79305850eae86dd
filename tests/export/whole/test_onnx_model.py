"""ONNX exports: token for token what Transformers generates, in both caches, alone and in a batch; files, names, checks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import every_family, greedy_tokens

import camshaft

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "run_onnx.py"
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "mistral", "phi", "gpt2", "bloom")
PROMPT_LENGTHS = (5, 23, 11)  # the second is longer than every window (16)
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def example() -> Any:
    """docs/examples/run_onnx.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("run_onnx", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (count,), generator=generator).tolist() for count in PROMPT_LENGTHS]


@pytest.mark.parametrize("name", every_family(FAMILIES, ("llama", "gemma2", "gpt_oss", "bloom")))
def test_tokens_equal_transformers(name: str, family: Callable[[str], Any], example: Any, tmp_path: Path) -> None:
    model = family(name)
    expected = [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in prompts()]
    for cache in ("linear", "paged"):
        path = tmp_path / cache
        camshaft.export_model(model, path, cache=cache, max_seq_len=40, block_size=4, progress=False)
        for chosen in ([1], [0, 1, 2]):
            made = example.Model(path, len(chosen), threads=1)
            tokens = example.generate(made, [prompts()[i] for i in chosen], NUM_TOKENS, set())
            assert tokens == [expected[i] for i in chosen], (cache, chosen)


def test_logits_of_all_rows_and_a_fixed_batch(family: Callable[[str], Any], example: Any, tmp_path: Path) -> None:
    model = family("llama")
    camshaft.export_model(model, tmp_path / "m", logits="all", batch_size=2, max_seq_len=40, progress=False)
    expected = [greedy_tokens(model, prompt, 4) for prompt in prompts()[:2]]
    assert example.generate(example.Model(tmp_path / "m", 2, threads=1), prompts()[:2], 4, set()) == expected
    with pytest.raises(SystemExit, match="exported for 2 sequences, not 1"):
        example.Model(tmp_path / "m", 1)
    names = [
        tensor["name"] for tensor in json.loads((tmp_path / "m" / "export.json").read_text())["programs"][0]["inputs"]
    ]
    assert "last_rows" not in names


@pytest.fixture(scope="module")
def exported(family: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A paged export of the small Llama."""
    path = tmp_path_factory.mktemp("whole") / "llama"
    camshaft.export_model(family("llama"), path, cache="paged", max_seq_len=40, block_size=4, progress=False)
    return path


def test_example_runs_without_torch_and_camshaft(exported: Path, family: Callable[[str], Any]) -> None:
    code = "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'camshaft', 'transformers', 'onnx')));"
    code += f"sys.argv = sys.argv[:1] + sys.argv[1:]; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    ids = [argument for prompt in prompts()[:2] for argument in ("--ids", ",".join(map(str, prompt)))]
    options = ["--max-tokens", "6", "--ignore-eos", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", code, str(exported), *ids, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == [greedy_tokens(family("llama"), prompt, 6) for prompt in prompts()[:2]]


def test_example_says_what_is_wrong(exported: Path, example: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no export.json"):
        example.read_export(tmp_path)
    document = json.loads((exported / "export.json").read_text())
    for change, message in (
        ({"format": "tensorrt"}, "need onnx"),
        ({"dtype": "bfloat16"}, "no bfloat16 kernels"),
        ({"files": {"model.onnx": {"bytes": 1}}}, "missing or cut short"),
    ):
        (tmp_path / "export.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(SystemExit, match=message):
            example.read_export(tmp_path)


def test_files_names_and_metadata(exported: Path) -> None:
    document = json.loads((exported / "export.json").read_text())
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    program = document["programs"][0]
    inputs = ["token_ids", "positions", "last_rows", "block_tables", "slot_mapping"]
    caches = ["k_cache.0", "v_cache.0", "k_cache.1", "v_cache.1"]
    assert [entry.name for entry in model.graph.input] == [*inputs, *caches] == [t["name"] for t in program["inputs"]]
    outputs = [entry.name for entry in model.graph.output]
    assert outputs == ["logits", "k_cache_out.0", "v_cache_out.0", "k_cache_out.1", "v_cache_out.1"]
    assert [tensor.get("updates") for tensor in program["outputs"]] == [None, *caches]
    assert program["inputs"][0]["shape"] == ["batch", "num_tokens"]
    assert program["inputs"][5]["shape"] == ["num_blocks", 4, 2, 16]
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["cache"] == "paged" and metadata["dtype"] == "float32" and metadata["block_size"] == "4"
    assert metadata["version.camshaft"] == camshaft.__version__ == document["versions"]["camshaft"]
    assert document["model"]["vocab_size"] == 128 and document["cache"]["scratch_block"] == 0
    assert set(document["files"]) == {"model.onnx", "model.onnx.data"}
    assert (exported / "model.onnx").stat().st_size < 40_000  # the weights are beside it
    external = [entry for entry in model.graph.initializer if entry.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) > 10
    for entry in external:
        facts = {item.key: item.value for item in entry.external_data}
        assert facts["location"] == "model.onnx.data" and int(facts["offset"]) % 4096 == 0


def test_bfloat16_passes_the_checker(family: Callable[[str], Any], tmp_path: Path) -> None:
    """Caches and weights take the dtype, logits are float32; ONNX Runtime's CPU does not run it, and the export says so."""
    made = camshaft.export_model(family("gpt_oss"), tmp_path / "m", dtype="bfloat16", max_seq_len=40, progress=False)
    model = onnx.load(tmp_path / "m" / "model.onnx", load_external_data=False)
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*model.graph.input, *model.graph.output)}
    assert types["k_cache.0"] == types["k_cache_out.0"] == onnx.TensorProto.BFLOAT16
    assert types["logits"] == onnx.TensorProto.FLOAT
    assert "no bfloat16 kernels" in made.document["notes"][0]


def test_float16_runs(family: Callable[[str], Any], example: Any, tmp_path: Path) -> None:
    """The logits of a prompt, against float32; ten bits of mantissa through two layers."""
    model = family("llama")
    camshaft.export_model(model, tmp_path / "m", dtype="float16", max_seq_len=40, progress=False)
    logits = example.Model(tmp_path / "m", 1, threads=1).step([prompts()[1]])
    with torch.no_grad():
        expected = model(torch.tensor([prompts()[1]])).logits[0, -1]
    assert logits.dtype.name == "float32"
    assert float((torch.from_numpy(logits[0]) - expected).abs().max()) < 0.02 * float(expected.abs().max())
