"""Optimization passes: one file per rewrite, one written pipeline, one manager."""
