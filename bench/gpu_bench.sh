#!/usr/bin/env bash
# Llama-3.1-8B shape, random bf16 weights, through the command line: build, inspect, bench. Needs a CUDA GPU and 40 GB of disk.
#   bash bench/gpu_bench.sh OUT
set -euo pipefail
out=${1:?directory for the results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CAMSHAFT_CACHE=$work/cache PYTHONUNBUFFERED=1
python3 - "$work/model" <<'PY'
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False)
torch.manual_seed(0)
with torch.device("cuda"):
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
PY
camshaft() { python3 -m camshaft "$@"; }
camshaft build "$work/model" -o "$work/engine" --max-seq-len 4096 --max-batch-tokens 8192 --max-sequences 256 --json > "$out/build.json"
camshaft bench run "$work/engine" --num-requests 512 --input-len 128 --output-len 128 --repeat 3 --output "$out/throughput.json"
camshaft bench run "$work/engine" --latency --input-len 128 --output-len 128 --repeat 3 --output "$out/latency.json"
camshaft doctor --json > "$out/doctor.json" || true
