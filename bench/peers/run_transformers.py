"""Worker of `bench/cpu_peers.py`: `generate` of Transformers, eager, float32, with its dynamic KV cache."""

from __future__ import annotations

import time
from typing import Any

from protocol import Generate, Generated, MissingPeerError, Options, serve


class Clock:
    """A streamer for `generate` that keeps the time of each token; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def load(options: Options) -> tuple[Generate, dict[str, Any]]:
    """Opens the checkpoint in float32."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingPeerError(f"{error}; pip install torch transformers") from error
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompt: list[int], num_tokens: int) -> Generated:
        ids = torch.tensor([prompt])
        clock = Clock()
        start_s = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
        )
        tokens = out[0, len(prompt) :].tolist()
        return Generated(tokens=tokens, start_s=start_s, first_s=clock.times_s[1], last_s=clock.times_s[num_tokens])

    info = {
        "version": transformers.__version__,
        "torch": str(torch.__version__),
        "dtype": "float32",
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }
    return generate, info


if __name__ == "__main__":
    serve(load)
