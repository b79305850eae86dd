"""Logit error of bf16 against float32 on the same random weights: Transformers eager, and engines of both CUDA targets.

python3 bench/gpu_bf16_error.py OUT/bf16-error.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_large import make_model


def main() -> None:
    """Last-row logits of 16 prompts; errors are root mean squares over the vocabulary."""
    import camshaft
    from camshaft import SamplingParams

    small = not torch.cuda.is_available()
    device = "cpu" if small else "cuda"
    model = make_model(2 if small else 32, torch.bfloat16, small)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 200, (16,), generator=generator).tolist()
    prompts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
    found: dict[str, list[torch.Tensor]] = {}
    for target in ("eager",) if small else ("eager", "inductor"):
        engine: Any = camshaft.compile(
            model, target=target, dtype=torch.bfloat16, max_seq_len=256, max_batch_tokens=512
        )
        rows = found[f"camshaft {target}"] = []
        step = engine.step

        def keep(batch: Any, step: Any = step, rows: list[torch.Tensor] = rows) -> torch.Tensor:
            logits = step(batch)
            rows.append(logits[0].cpu())
            return logits

        engine.step = keep
        with camshaft.LLM(engine, kv_cache_bytes=1 << 28, enable_prefix_cache=False) as llm:
            for prompt in prompts:
                llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        del engine, step

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(torch.tensor([p], device=device)).logits[0, -1].float().cpu() for p in prompts]

    found["transformers eager"] = logits()
    model.float()
    exact = logits()
    result: dict[str, Any] = {"logit_std": float(torch.stack(exact).std())}
    for name, rows in found.items():
        errors = [float((row - reference).square().mean().sqrt()) for row, reference in zip(rows, exact)]
        agree = sum(int(row.argmax()) == int(reference.argmax()) for row, reference in zip(rows, exact))
        result[name] = {
            "rms_error_mean": sum(errors) / 16,
            "rms_error_max": max(errors),
            "first_token_as_float32": agree / 16,
        }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
