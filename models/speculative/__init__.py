"""Small networks that draft from a model's hidden states: Medusa's heads and EAGLE-3's layer, read, trained and written.

checkpoint.py   config.json and tensors of a published checkpoint
heads.py        residual heads on the last hidden state (Cai et al. 2024)
eagle.py        one decoder layer on captured hidden states (Li et al. 2025)
exit.py         norm and adapter of an early exit
train.py        python -m camshaft.models.speculative.train, with text.py, objectives.py and estimate.py
"""
