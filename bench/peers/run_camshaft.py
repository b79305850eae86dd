"""Worker of `bench/cpu_peers.py`: Camshaft; the variant is the compile target ("auto", "inductor", "onnxruntime", "eager")."""

from __future__ import annotations

import os
import time
from typing import Any

from protocol import Generate, Generated, Options, serve


def load(options: Options) -> tuple[Generate, dict[str, Any]]:
    """Compiles the model in float32, or takes the build from the cache."""
    # a build is made for a number of threads, so each number has a cache of its own
    os.environ["CAMSHAFT_CACHE"] = str(options.work / f"camshaft-{options.threads}-threads")
    import torch

    import camshaft

    torch.set_num_threads(options.threads)
    engine = camshaft.compile(str(options.model), target=options.variant, dtype="float32", progress=False)
    llm = camshaft.LLM(engine)
    manifest = engine.manifest

    def generate(prompt: list[int], num_tokens: int) -> Generated:
        params = camshaft.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        offset_s = time.perf_counter() - time.monotonic()
        start_s = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": prompt}], params)[0]
        first_s, last_s = output.metrics.first_token_s, output.metrics.finished_s
        assert first_s is not None and last_s is not None
        return Generated(
            tokens=list(output.token_ids), start_s=start_s, first_s=first_s + offset_s, last_s=last_s + offset_s
        )

    info = {
        "version": camshaft.__version__,
        "torch": str(torch.__version__),
        "target": manifest.build.target,
        "dtype": manifest.build.dtype,
        "report": list(manifest.report),
        "build_s": manifest.timings,
        "threads": torch.get_num_threads(),
    }
    return generate, info


if __name__ == "__main__":
    serve(load)
