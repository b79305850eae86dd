"""Recipes of quantization, and the algorithms behind them."""
