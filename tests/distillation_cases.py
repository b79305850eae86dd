"""A tiny model, a text and settings for tests of distillation."""

from __future__ import annotations

from typing import Any

from families import random_model

SMALL: dict[str, Any] = {
    "context": 32, "batch_tokens": 128, "prompt_tokens": 8, "sampled_tokens": 512, "evaluations": 2, "learning_rate": 3e-4,
    "validation": 0.2,
}  # fmt: skip
TEXT = "\f".join(
    f"The {i}th row of this text is about number {i * i % 97}, and row {i + 1} follows.\n" for i in range(40)
)


def tiny() -> Any:
    """A Llama whose distributions are not flat."""
    import transformers

    model = random_model(
        transformers.LlamaConfig(
            vocab_size=340, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.get_input_embeddings().weight.data.mul_(3)
    return model
