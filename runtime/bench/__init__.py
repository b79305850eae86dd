"""Measuring: workloads, timed runs of an LLM, Transformers as the peer, and documents that can be compared.

workload.py      which requests (no torch)         statistics.py   percentiles, median and spread
measure.py       runs of an LLM                    environment.py  versions, machine, commit
peer.py          runs of Transformers              document.py     the JSON document, and two of them side by side
"""
