"""Quality of engines: log-likelihoods of texts and tasks, and how far a quantized engine is from the unquantized one.

teacher_forcing.py  engines of one model stepped over the same tokens     tasks.py       tasks in JSONL
divergence.py       perplexity, KL divergence, top-1 agreement            harness.py     for lm-evaluation-harness
likelihood.py       log-likelihoods of continuations                      comparison.py  recipes: quality, size, speed
                                                                          report.py      the JSON document and the page

Importing this package imports no torch; harness.py needs lm_eval (the extra "eval").
"""
