"""The command line: every command on a tiny model, --json, errors and exit codes."""

import io
import json
import subprocess
import sys

import pytest
from runtime.small_tokenizers import CHATML, byte_level, save

from camshaft.cli.app import run
from camshaft.cli.bisect import findings
from camshaft.cli.common import parse_bytes
from camshaft.cli.demo import choose_prompts

LIMITS = [
    "--target",
    "eager",
    "--device",
    "cpu",
    "--max-seq-len",
    "96",
    "--max-batch-tokens",
    "48",
    "--max-sequences",
    "8",
]
COMMANDS = (
    "demo",
    "build",
    "calibrate",
    "distill",
    "export",
    "generate",
    "bench",
    "eval",
    "inspect",
    "bisect",
    "doctor",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory: a random 2-layer Llama, a tokenizer, a chat template."""
    import torch
    import transformers

    path = tmp_path_factory.mktemp("model") / "tiny"
    config = transformers.LlamaConfig(
        vocab_size=340, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    made.save_pretrained(path)
    save(byte_level(), path, chat_template=CHATML)
    return str(path)


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    """(engine directory, the document of `camshaft build --verify --json`)."""
    path = tmp_path_factory.mktemp("engine") / "tiny.engine"
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        code = run(["build", model, "-o", str(path), *LIMITS, "--verify", "--report", "--json"])
    assert code == 0
    return str(path), json.loads(stdout.getvalue())


@pytest.fixture
def cli(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_is_quick_and_explains_every_command():
    """No command's --help imports torch."""
    code = (
        "import sys\n"
        "from camshaft.cli.app import run\n"
        f"for command in ([], *([c] for c in {COMMANDS!r}), ['bench', 'run'], ['bench', 'compare'], ['bench', 'report']):\n"
        "    assert run([*command, '--help']) == 0\n"
        "assert run(['--version']) == 0\n"
        "sys.exit(3 if {'torch', 'transformers', 'numpy'} & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout
    assert "camshaft 0." in done.stdout


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "camshaft", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "No such command" in done.stderr and done.stdout == ""


def test_build_writes_an_engine_and_verifies_it(built):
    _, document = built
    assert document["verify"]["ok"] and document["verify"]["logits_error"] < 1e-4
    assert len(document["verify"]["tokens"]) == 16
    assert document["build"]["target"] == "eager" and document["build"]["max_seq_len"] == 96
    assert document["num_segments"] == 3 and "tracing" in document["timings"]
    compared = [record["max_error"] for record in document["passes"] if record["max_error"] is not None]
    assert len(compared) >= 8 and max(compared) < 1e-4
    assert "tokenizer/tokenizer.json" in document["files"]


def test_build_prints_tables_and_dumps_graphs(cli, model, tmp_path):
    code, out, _ = cli("build", model, "-o", tmp_path / "e", *LIMITS, "--dump", tmp_path / "dump", "--no-cache")
    assert code == 0
    for text in ("match_attention", "Segments: 3 distinct", "time: ", "tiny, 0.0 M parameters", "camshaft generate"):
        assert text in out
    assert len(list((tmp_path / "dump").glob("*.txt"))) > 10


def test_build_refuses_a_taken_path_before_the_work(cli, model, built, tmp_path):
    code, out, err = cli("build", model, "-o", built[0], *LIMITS)
    assert code == 1 and out == "" and err.startswith("error: ") and "--overwrite" in err and err.count("\n") == 1
    (tmp_path / "file").write_text("mine")
    assert cli("build", model, "-o", tmp_path / "file", *LIMITS)[0] == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_build_reports_a_wrong_engine(cli, model, built, tmp_path, monkeypatch):
    from camshaft.export import bisect

    import camshaft

    honest = bisect._decode

    def lying(engine, prompt, count):
        tokens, logits = honest(engine, prompt, count)
        return tokens, logits + 1

    monkeypatch.setattr(bisect, "_decode", lying)
    monkeypatch.setattr(camshaft, "compile", lambda *_, **__: camshaft.load(built[0]), raising=False)
    code, out, _ = cli("build", model, "-o", tmp_path / "e", *LIMITS, "--verify")
    assert code == 1 and "DISAGREES" in out and "camshaft bisect" in out


def test_generate_completes_all_prompts(cli, built):
    arguments = (
        "generate",
        built[0],
        "The quick",
        "Pack my",
        "--max-tokens",
        6,
        "--temperature",
        0,
        "--kv-cache-bytes",
        "1M",
    )
    code, out, err = cli(*arguments)
    assert code == 0 and out.startswith("The quick") and "Pack my" in out and "12 tokens in" in err
    code, plain, _ = cli(*arguments, "--no-stream")
    assert code == 0 and plain.split() == out.split()
    code, text, _ = cli(*arguments, "--json")
    document = json.loads(text)
    assert code == 0 and document["num_tokens"] == 12
    assert [output["prompt"] for output in document["outputs"]] == ["The quick", "Pack my"]
    assert document["outputs"][0]["outputs"][0]["text"].split()[0] in out


def test_generate_samples_chats_and_reads_stdin(cli, built, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first line\n\nsecond line\n"))
    code, text, _ = cli("generate", built[0], "-", "--n", 2, "--seed", 5, "--max-tokens", 4, "--top-p", 0.9, "--json")
    document = json.loads(text)
    assert code == 0 and [o["prompt"] for o in document["outputs"]] == ["first line", "second line"]
    assert [len(o["outputs"]) for o in document["outputs"]] == [2, 2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("first line\n\nsecond line\n"))
    again = json.loads(
        cli("generate", built[0], "-", "--n", 2, "--seed", 5, "--max-tokens", 4, "--top-p", 0.9, "--json")[1]
    )
    assert [o["outputs"] for o in again["outputs"]] == [o["outputs"] for o in document["outputs"]]
    code, text, _ = cli("generate", built[0], "--chat", "Hello", "--max-tokens", 3, "--temperature", 0, "--json")
    assert code == 0 and json.loads(text)["outputs"][0]["num_prompt_tokens"] > 5  # the template's tokens


def test_conversation_keeps_its_history(cli, built, monkeypatch):
    lines = iter(["Hello", "", "again", "/new", "once more", "/exit"])
    asked = []
    from camshaft.runtime import LLM

    def record(self, prompt, params=None, **kwargs):
        asked.append([message["content"] for message in prompt])
        return original(self, prompt, params, **kwargs)

    original = LLM.generate_async
    monkeypatch.setattr(LLM, "generate_async", record)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, _ = cli("generate", built[0], "--chat", "--max-tokens", 3, "--temperature", 0)
    assert code == 0
    assert [len(messages) for messages in asked] == [1, 3, 1] and asked[1][0] == "Hello" and asked[2] == ["once more"]


def test_inspect_shows_what_is_in_an_engine(cli, built):
    code, text, _ = cli("inspect", built[0], "--json")
    document = json.loads(text)
    assert code == 0 and document["cache"]["groups"] == [
        {"window": 0, "num_layers": 2, "bytes_per_block": 16 * 2 * (8 + 8) * 4 * 2}
    ]
    segment = document["segments"][1]
    assert segment["runs"] == 1 and segment["operators"]["aten.linear.default"] == 4
    code, out, _ = cli("inspect", built[0])
    assert code == 0 and "LlamaForCausalLM" in out and "KV cache: blocks of 16 tokens" in out
    code, out, _ = cli("inspect", built[0], "--graph", segment["id"][:6])
    assert code == 0 and "camshaft.glu.default(" in out and out.strip().splitlines()[-1].startswith("return [")
    assert "match_rope" in cli("inspect", built[0], "--passes")[1]
    assert "lm_head.weight" in cli("inspect", built[0], "--weights")[1]
    assert "plan.json" in cli("inspect", built[0], "--files")[1]
    code, _, err = cli("inspect", built[0], "--graph", "zzz")
    assert code == 1 and segment["id"] in err


def test_bisect_finds_nothing_in_a_right_model(cli, model):
    code, out, _ = cli("bisect", model, "--target", "eager", "--device", "cpu", "--num-tokens", 12)
    assert code == 0 and "passes and targets eager agree within 0.001" in out


def test_bisect_names_a_wrong_pass(cli, model, monkeypatch):
    from camshaft.passes import fuse_glu

    honest = fuse_glu.FuseGlu.run

    def wrong(self, program):
        matches = honest(self, program)
        for node in program.graph.nodes:
            if "glu" in str(node.target):
                node.update_arg(1, "relu")
        return matches

    monkeypatch.setattr(fuse_glu.FuseGlu, "run", wrong)
    code, text, _ = cli("bisect", model, "--target", "none", "--device", "cpu", "--json")
    document = json.loads(text)
    assert code == 1 and not document["ok"]
    assert (
        document["first_bad_pass"]["name"] == "fuse_glu" and "fuse_glu: its output differs" in document["findings"][0]
    )


def test_bisect_names_the_target_and_segment(cli, model, monkeypatch):
    from camshaft.export.targets import eager

    honest = eager.EagerTarget.load
    calls = []

    def wrong(self, segment, engine, device):
        lowered = honest(self, segment, engine, device)
        calls.append(segment.id)
        if len(calls) == 2:  # the first three loads are the target's, the next three the oracle's
            lowered.bind = lambda weights: (
                lambda *inputs: [x * 1.5 for x in type(lowered).bind(lowered, weights)(*inputs)]
            )
        return lowered

    monkeypatch.setattr(eager.EagerTarget, "load", wrong)
    code, out, _ = cli("bisect", model, "--target", "eager", "--device", "cpu")
    assert code == 1 and f"target eager, segment {calls[1]}" in out and "differs from eager by 0.5" in out


def test_bench_measures_and_compares(cli, built, tmp_path):
    load = ("--num-requests", 4, "--input-len", "4:8", "--output-len", 6, "--repeat", 2, "--kv-cache-bytes", "1M")
    for name in ("a.json", "b.json"):
        code, out, err = cli("bench", built[0], *load, "--output", tmp_path / name)
        assert code == 0 and "output tokens/s" in out and "ITL p99, ms" in out and "camshaft, run 2" in err
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["model"]["target"] == "eager" and document["workload"]["input_len"] == [4, 8]
    result = document["results"][0]
    assert result["summary"]["output_tokens"]["median"] == 24 and len(result["repeats"]) == 2
    code, out, _ = cli("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0 and "ratio" in out
    code, text, _ = cli("bench", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert code == 0 and json.loads(text)["comparisons"][0]["conditions"] == []


def test_bench_latency_and_baseline_stand_in_one_document(cli, model):
    load = ("--num-requests", 3, "--input-len", "4:8", "--output-len", "4:6", "--repeat", 1, "--kv-cache-bytes", "1M")
    code, text, _ = cli("bench", model, *LIMITS, *load, "--baseline", "transformers", "--json")
    results = json.loads(text)["results"]
    assert code == 0
    assert [r["system"] for r in results] == [
        "camshaft",
        "transformers, one by one",
        "transformers, static batches of 3",
    ]
    assert len({r["summary"]["output_tokens"]["median"] for r in results}) == 1
    code, text, _ = cli("bench", "--latency", model, *LIMITS, *load, "--baseline", "transformers", "--json")
    results = json.loads(text)["results"]
    assert code == 0 and [r["mode"] for r in results] == ["latency", "latency"]
    assert all(r["summary"]["decode_ms_p50"]["median"] > 0 for r in results)


def test_bench_takes_prompts_from_a_text(cli, built, tmp_path):
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    load = (
        "--num-requests",
        2,
        "--input-len",
        9,
        "--output-len",
        2,
        "--repeat",
        1,
        "--warmup",
        0,
        "--kv-cache-bytes",
        "1M",
    )
    assert cli("bench", built[0], *load, "--text", tmp_path / "text", "--shared-prefix", 8)[0] == 0


def test_bench_refuses_what_it_cannot_measure(cli, built):
    for arguments, text in (
        (["--baseline", "transformers"], "Transformers needs the model"),
        (["--baseline", "other"], "allowed: transformers"),
        (["--input-len", "x"], "--input-len is 'x'"),
        (["--output-len", "500"], "lower --input-len or --output-len"),
        (["--policy", "other", "--input-len", "8", "--output-len", "8"], "policy is 'other'"),
    ):
        code, out, err = cli("bench", built[0], *arguments)
        assert code == 1 and out == "" and err.startswith("error: ") and text in err


def test_doctor_reports_this_machine(cli):
    code, text, _ = cli("doctor", "--no-self-test", "--json")
    facts = json.loads(text)
    assert code == 0 and facts["ok"] and facts["packages"]["torch"] and facts["targets"]["cpu"]["eager"] is None
    assert facts["cache"]["directory"] and facts["compilers"] and "cpu float32" in facts["attention"]
    assert set(facts["tensorrt"]) == {"flavour", "version", "problem"} and "problem" in facts["torch_tensorrt"]
    code, out, _ = cli("doctor", "--no-self-test")
    assert code == 0 and "Attention kernels" in out and "should work (not tested)" in out


def test_doctor_tests_targets(cli, monkeypatch):
    from camshaft.cli import doctor

    monkeypatch.setattr(
        doctor, "_targets", lambda device: {"eager": None, "onnxruntime": "not installed; pip install it"}
    )
    monkeypatch.setattr(doctor, "_default_target", lambda targets, device: "eager")
    code, text, _ = cli("doctor", "--json")
    facts = json.loads(text)
    assert code == 0 and [t["target"] for t in facts["self_test"]] == ["eager"]
    assert facts["self_test"][0]["detail"] == "36 of 36 tokens equal"
    monkeypatch.setattr(doctor, "_test_target", lambda target, device: (False, "30 of 36 tokens equal"))
    code, out, _ = cli("doctor")
    assert code == 1 and "FAILED" in out and "pip install it" in out


def test_doctor_tests_tensorrt(cli, monkeypatch):
    from camshaft.export.tensorrt import selftest

    from camshaft.cli import doctor

    monkeypatch.setattr(doctor, "_targets", lambda device: {"eager": None})
    monkeypatch.setattr(doctor, "run_self_test", lambda target, device: {
        "target": target, "device": device, "ok": True, "seconds": 0.0, "detail": "",
    })  # fmt: skip
    problem = "tensorrt or tensorrt_rtx is not installed; pip install 'camshaft[tensorrt]'"
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_tensorrt", lambda: {"flavour": None, "version": None, "problem": problem})
        code, text, _ = cli("doctor", "--json")
        assert code == 0 and json.loads(text)["tensorrt"]["self_test"] is None
        assert "camshaft[tensorrt]" in cli("doctor", "--no-self-test")[1]
    there = {"flavour": "tensorrt_rtx", "version": "1.6.1.120", "problem": None}
    monkeypatch.setattr(doctor, "_tensorrt", lambda: there.copy())
    made = selftest.SelfTest(
        ok=False, detail="it does not run", flavour="tensorrt_rtx", build_s=0.05, engine_bytes=4096
    )
    monkeypatch.setattr(selftest, "self_test", lambda: made)
    code, text, _ = cli("doctor", "--json")
    found = json.loads(text)["tensorrt"]
    assert code == 0 and found["version"] == "1.6.1.120"  # the exit code is the default target's
    assert found["self_test"]["ok"] is False and found["self_test"]["engine_bytes"] == 4096
    code, out, _ = cli("doctor")
    assert "Self-test of TensorRT" in out and "FAILED" in out and "50 ms, 4.00 KiB" in out and "1.6.1.120" in out


def test_doctor_tests_a_target_for_modules():
    from camshaft.cli import doctor

    ok, detail = doctor._test_module("eager", "cpu")
    assert ok and "an MLP: largest difference" in detail


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["generate", "/nowhere/at/all", "x"], "there is no directory /nowhere/at/all"),
        (["inspect", "/nowhere"], "/nowhere is not an engine"),
        (["build", "/nowhere/at/all", "-o", "/tmp/never"], "there is no directory"),
        (["bisect", "demo", "--target", "nonsense"], "unknown target 'nonsense'"),
        (["bench", "compare", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(cli, arguments, text):
    code, out, err = cli(*arguments)
    assert code == 1 and out == "" and text in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_bad_options_of_generate_are_errors(cli, built):
    for arguments, text in (
        (["x", "--temperature", "-1"], "temperature is -1.0"),
        (["x", "--dtype", "float16"], "--dtype cannot be changed"),
        (["x", "--kv-cache-bytes", "many"], "--kv-cache-bytes is 'many'"),
        ([], "no prompt"),
    ):
        code, _, err = cli("generate", built[0], *arguments)
        assert code == 1 and text in err
    assert cli("generate", built[0], "x", "--max-tokens", "many")[0] == 2


def test_debug_shows_the_traceback(cli):
    with pytest.raises(ValueError, match="is not an engine"):
        cli("inspect", "/nowhere", "--debug")


def test_bytes_have_units():
    assert parse_bytes("512", "--x") == 512 and parse_bytes("1.5k", "--x") == 1536 and parse_bytes(None, "--x") is None
    assert parse_bytes("2GiB", "--x") == parse_bytes("2G", "--x") == parse_bytes("2 GB", "--x") == 2 << 30


def test_demo_prompts_are_half_chats_and_spread():
    entries = [{"text": str(i)} for i in range(6)] + [{"chat": [{"role": "user", "content": str(i)}]} for i in range(3)]
    chosen = choose_prompts(entries, 4)
    assert chosen == [{"text": "0"}, {"text": "3"}, entries[6], entries[7]]
    assert len(choose_prompts(entries, 100)) == 9 and choose_prompts(entries, 1) == [{"text": "0"}]


@pytest.mark.slow
def test_demo_runs_offline(cli):
    code, out, _ = cli("demo", "--target", "eager", "--device", "cpu", "--max-tokens", 8, "--num-prompts", 2)
    assert code == 0 and "tokens/s" in out and "memory of cpu" in out and "fuse_projections" in out


def test_findings_name_errors_that_only_add_up():
    from camshaft.export.bisect import TargetBisection
    from camshaft.passes.bisect import PassBisection

    passes = PassBisection(checks=(), program=None, tolerance=1e-3)
    summed = TargetBisection(target="t", tolerance=1e-3, checks=(), logits_error=0.02)
    assert "add up to 0.02" in findings(passes, [summed])[0]
