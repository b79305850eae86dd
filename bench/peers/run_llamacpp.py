"""Worker of `bench/cpu_peers.py`: llama.cpp by the C functions of llama-cpp-python; the variant is "WEIGHTS/CACHE" in f32 or f16.

    CMAKE_BUILD_PARALLEL_LEVEL=1 pip install llama-cpp-python gguf

The loop calls llama_decode and takes the argmax of its logits, with nothing of the Python package's own sampling around it.
With an f16 cache everything is as llama.cpp has it by default; with an f32 cache its flash attention, which computes in f16
and is slow on such a cache, is off, and everything is in f32.
"""

from __future__ import annotations

import ctypes
import sys
import time
from importlib.metadata import version
from typing import Any

from protocol import Generate, Generated, MissingPeerError, Options, serve

CONTEXT_TOKENS = 2048
"""Room of the KV cache; llama.cpp reads only what is filled, up to the next multiple of 256."""


def open_context(lib: Any, path: str, options: Options) -> Any:
    """The model's context on the CPU, its KV cache as the variant says."""
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise RuntimeError(f"llama.cpp does not open {path}; see its output above")
    params = lib.llama_context_default_params()
    params.n_ctx = CONTEXT_TOKENS
    params.n_threads = params.n_threads_batch = options.threads
    if options.variant.endswith("/f32"):
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context of {CONTEXT_TOKENS} tokens for {path}; see its output above")
    return context


def load(options: Options) -> tuple[Generate, dict[str, Any]]:
    """Writes the GGUF file where that was not done yet, and opens it."""
    try:
        import gguf  # noqa: F401 - to_gguf needs it
        import numpy as np
        from llama_cpp import llama_cpp as lib
    except ImportError as error:
        raise MissingPeerError(f"{error} in {sys.executable}; pip install llama-cpp-python gguf") from error
    from to_gguf import write_gguf

    weights, _, cache = options.variant.partition("/")
    if cache not in ("f32", "f16"):
        raise ValueError(f"variant is {options.variant}; allowed: f32 or f16 for the weights, a slash, f32 or f16")
    path = options.work / f"llamacpp-{weights}.gguf"
    if not path.is_file():
        write_gguf(options.model, path, weights)
    lib.llama_backend_init()
    context = open_context(lib, str(path), options)
    model = lib.llama_get_model(context)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    memory = lib.llama_get_memory(context)

    def step(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(vocab_size,))
        return int(logits.argmax())

    def generate(prompt: list[int], num_tokens: int) -> Generated:
        lib.llama_memory_clear(memory, True)
        start_s = time.perf_counter()
        tokens = [step(prompt)]
        first_s = time.perf_counter()
        while len(tokens) < num_tokens:
            tokens.append(step(tokens[-1:]))
        return Generated(tokens=tokens, start_s=start_s, first_s=first_s, last_s=time.perf_counter())

    info = {
        "version": version("llama-cpp-python"),
        "gguf": version("gguf"),
        "dtype": weights,
        "cache_dtype": cache,
        "system": lib.llama_print_system_info().decode(),
        "threads": options.threads,
    }
    return generate, info


if __name__ == "__main__":
    serve(load)
