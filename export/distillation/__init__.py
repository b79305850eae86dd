"""Quantization-aware distillation: weights that are tuned so that a recipe's rounding costs the model little."""
