#!/usr/bin/env python3
"""Greedy generation with a model that `camshaft export --format onnx` wrote. Needs onnxruntime and numpy, nothing else.

    python run_onnx.py DIR --ids 1,15,7 --ids 1,4 --max-tokens 20     token ids of one or several prompts
    python run_onnx.py DIR --text "Once upon a time"                  with `pip install tokenizers`

Prints one JSON document: {"tokens": [[...], ...]}, and "texts" for --text. What a step of the model takes is explained in `Batch`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


class Batch:
    """What the sequences of a batch have in the KV cache, and the inputs of the next step.

    A step takes S rows for each of B sequences; a sequence with fewer new tokens is padded at its end:

        token_ids [B, S]     10 11 12      last_rows [B]  2   the row whose logits are wanted
                             20  .  .                     0
    positions [B, S]: where each token stands in its sequence. Linear caches: consecutive, padding too (what padding writes lies
    behind the sequence, where nothing looks before it is overwritten). Paged caches: 0 for padding, with slot 0.
    block_tables [B, W]: the blocks of each sequence in order, unused entries 0. slot_mapping [B, S]: block * block_size + offset
    of each token. Block 0 belongs to no sequence: padding writes there.
    """

    def __init__(self, cache: dict, max_seq_len: int, num_sequences: int):
        self.lengths = np.zeros(num_sequences, np.int64)
        self.paged = cache["kind"] == "paged"
        self.block_size = cache.get("block_size") or 1
        width = -(-max_seq_len // self.block_size)  # blocks of the longest sequence
        self.num_blocks = num_sequences * width + 1
        self.tables = 1 + np.arange(num_sequences * width, dtype=np.int64).reshape(num_sequences, width)

    def inputs(self, new: list) -> dict:
        """The inputs for the new tokens of each sequence, one or more; they count as computed from here on."""
        shape = (len(new), max(len(tokens) for tokens in new))
        token_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        slots = np.zeros(shape, np.int64)
        for b, tokens in enumerate(new):
            count = len(tokens)
            where = self.lengths[b] + np.arange(shape[1])
            token_ids[b, :count] = tokens
            if self.paged:
                positions[b, :count] = where[:count]
                block = self.tables[b, where[:count] // self.block_size]
                slots[b, :count] = block * self.block_size + where[:count] % self.block_size
            else:
                positions[b] = where
            self.lengths[b] += count
        last_rows = np.array([len(tokens) - 1 for tokens in new], np.int64)
        feeds = {"token_ids": token_ids, "positions": positions, "last_rows": last_rows}
        if self.paged:
            width = -(-int(self.lengths.max()) // self.block_size)  # no more entries than the longest sequence needs
            feeds |= {"slot_mapping": slots, "block_tables": np.ascontiguousarray(self.tables[:, :width])}
        return feeds


class Model:
    """An exported model: session and caches."""

    def __init__(self, directory: Path, num_sequences: int, threads: int = 0):
        self.export = read_export(directory)
        (program,) = self.export["programs"]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        model = str(directory / program["file"])
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        fixed = self.export["batch_size"]
        if fixed not in (None, num_sequences):
            raise SystemExit(f"the model was exported for {fixed} sequences, not {num_sequences}")
        self.batch = Batch(self.export["cache"], self.export["max_seq_len"], num_sequences)
        pool = self.export["cache"].get("num_blocks")
        if pool is not None and pool < self.batch.num_blocks:
            raise SystemExit(f"the model was exported for {pool} blocks; {self.batch.num_blocks} are needed here")
        sizes = {"batch": num_sequences, "num_blocks": self.batch.num_blocks}
        self.caches = {}
        for tensor in program["inputs"]:
            if "_cache." in tensor["name"]:  # zeros: what was never written must at least be finite
                shape = [sizes.get(size, size) for size in tensor["shape"]]
                self.caches[tensor["name"]] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, tensor["dtype"]))
        self.outputs = program["outputs"]
        self.wanted = {tensor["name"] for tensor in program["inputs"]}

    def step(self, new: list) -> np.ndarray:
        """The logits [B, vocabulary] after the last new token of each sequence."""
        longest = int(self.batch.lengths.max()) + max(len(tokens) for tokens in new)
        if longest > self.export["max_seq_len"]:
            raise SystemExit(f"a sequence of {longest} tokens; the model was exported for {self.export['max_seq_len']}")
        binding = self.session.io_binding()
        feeds = self.batch.inputs(new)
        for name in self.wanted & set(feeds):
            binding.bind_cpu_input(name, feeds[name])
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
        for tensor in self.outputs:
            if "updates" in tensor:  # the same memory as the input: the cache is updated in place
                binding.bind_ortvalue_output(tensor["name"], self.caches[tensor["updates"]])
            else:
                binding.bind_output(tensor["name"])
        self.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[[tensor["name"] for tensor in self.outputs].index("logits")].numpy()
        if self.export["logits"] == "all":
            return logits[np.arange(len(new)), feeds["last_rows"]]
        return logits


def read_export(directory: Path) -> dict:
    """The content of export.json; ends with a clear message where it does not fit."""
    file = directory / "export.json"
    if not file.is_file():
        raise SystemExit(f"{directory} has no export.json; write one with: camshaft export MODEL -o {directory}")
    export = json.loads(file.read_text())
    if export.get("format") != "onnx" or export.get("camshaft_export") != 1:
        raise SystemExit(
            f"{file} is a {export.get('format')} export, version {export.get('camshaft_export')}; need onnx, 1"
        )
    if export["dtype"] == "bfloat16":
        raise SystemExit("ONNX Runtime's CPU provider has no bfloat16 kernels; export again with --dtype float32")
    for name, facts in export["files"].items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != facts["bytes"]:
            raise SystemExit(f"{directory / name} is missing or cut short; copy or export it again")
    return export


def generate(model: Model, prompts: list, max_tokens: int, eos: set) -> list:
    """Greedy tokens for each prompt, without the end token; a finished sequence goes on in the batch, unheard."""
    tokens: list = [[] for _ in prompts]
    done = [False] * len(prompts)
    new = [list(prompt) for prompt in prompts]
    for _ in range(max_tokens):
        chosen = model.step(new).argmax(axis=-1)
        for b, token in enumerate(chosen):
            done[b] = done[b] or int(token) in eos
            if not done[b]:
                tokens[b].append(int(token))
        if all(done):
            break
        new = [[int(token)] for token in chosen]
    return tokens


def main() -> None:
    """Reads the command line and generates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what `camshaft export` wrote")
    parser.add_argument(
        "--ids", action="append", default=[], help="token ids of a prompt, with commas; may be repeated"
    )
    parser.add_argument("--text", action="append", default=[], help="a prompt as text; needs the package tokenizers")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: as many as there are cores")
    options = parser.parse_args()
    prompts = [[int(item) for item in text.split(",")] for text in options.ids]
    tokenizer = None
    if options.text:
        from tokenizers import Tokenizer  # pip install tokenizers

        tokenizer = Tokenizer.from_file(str(options.directory / "tokenizer" / "tokenizer.json"))
        prompts += [tokenizer.encode(text).ids for text in options.text]
    if not prompts or not all(prompts):
        parser.error("give at least one prompt of one token or more, with --ids or --text")
    model = Model(options.directory, len(prompts), options.threads)
    vocabulary = model.export["model"]["vocab_size"]
    if any(not 0 <= token < vocabulary for prompt in prompts for token in prompt):
        parser.error(f"token ids are 0 to {vocabulary - 1}")
    eos = set() if options.ignore_eos else set(model.export["model"]["eos_token_ids"])
    tokens = generate(model, prompts, options.max_tokens, eos)
    result: dict = {"tokens": tokens}
    if tokenizer is not None:
        result["texts"] = [tokenizer.decode(row) for row in tokens[len(options.ids) :]]
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
