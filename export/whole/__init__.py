"""Whole-graph export: one file from token ids to logits, for use without Camshaft's runtime. See docs/export.md."""
