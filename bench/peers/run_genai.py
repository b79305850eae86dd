"""Worker of `bench/cpu_peers.py`: ONNX Runtime GenAI on the CPU; the variant is its builder's precision ("fp32").

pip install torch==2.13.0
pip install onnxruntime-genai transformers onnx onnx-ir onnxscript
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from protocol import Generate, Generated, MissingPeerError, Options, serve


def convert(options: Options) -> Path:
    """The model as the library's own builder makes it, in a directory."""
    out = options.work / f"genai-{version('onnxruntime-genai')}-{options.variant}"
    if out.is_dir():
        return out
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(options.model), "-o", str(part)]
    command += ["-p", options.variant, "-e", "cpu", "-c", str(options.work / "genai-cache")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=sys.stderr, env=environment)
    if done.returncode != 0:
        shutil.rmtree(part, ignore_errors=True)
        raise MissingPeerError(
            f"the model builder of onnxruntime-genai ended with {done.returncode}; see its output above"
        )
    # no token ends a generation; an overlay would add to the list, not replace it
    path = part / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["eos_token_id"] = []
    path.write_text(json.dumps(settings, indent=1))
    part.rename(out)
    return out


def load(options: Options) -> tuple[Generate, dict[str, Any]]:
    """Converts the checkpoint where that was not done yet, and opens it with the number of threads asked for."""
    try:
        import numpy as np
        import onnxruntime_genai as og
    except ImportError as error:
        raise MissingPeerError(f"{error} in {sys.executable}; pip install onnxruntime-genai") from error
    config = og.Config(str(convert(options)))
    session = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def generate(prompt: list[int], num_tokens: int) -> Generated:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + num_tokens, batch_size=1)
        generator = og.Generator(model, params)
        start_s = time.perf_counter()
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        generator.generate_next_token()
        first_s = time.perf_counter()
        for _ in range(num_tokens - 1):
            generator.generate_next_token()
        last_s = time.perf_counter()
        tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        return Generated(tokens=tokens, start_s=start_s, first_s=first_s, last_s=last_s)

    info = {
        "version": version("onnxruntime-genai"),
        "onnxruntime": version("onnxruntime"),
        "dtype": options.variant,
        "threads": options.threads,
    }
    return generate, info


if __name__ == "__main__":
    serve(load)
