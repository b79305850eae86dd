"""Measuring: workloads, timed runs of an LLM, Transformers as the peer, and documents that can be compared and drawn.

workload.py   which requests                       session.py      one engine, case after case
cases.py      how they are measured; suites        recording.py    an engine that notes its steps
measure.py    all at once, one by one              profile.py      what the device does in a step
load.py       at a rate                            roofline.py     what it could do at best
peer.py       runs of Transformers                 document.py     the JSON document, and two of them side by side
statistics.py percentiles, median and spread       report.py       documents as a page, with charts.py
environment.py  versions, machine, commit           page.py         HTML in one file

All but peer.py import torch only where they use it.
"""
