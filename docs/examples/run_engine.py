#!/usr/bin/env python3
"""Greedy generation with engines that `camshaft export --format tensorrt` wrote, on an NVIDIA GPU.

Needs tensorrt or tensorrt_rtx, numpy, and CUDA's runtime library (libcudart); neither torch nor Camshaft.

    python run_engine.py DIR --ids 1,15,7 --ids 1,4 --max-tokens 20     token ids of one or several prompts
    python run_engine.py DIR --text "Once upon a time"                  with `pip install tokenizers`
    python run_engine.py DIR --check                                    compares every file with its sha256; needs no GPU

Prints one JSON document: {"tokens": [[...], ...]}, and "texts" for --text. What a step of the model takes is explained in `Batch`.
"""

import argparse
import ctypes
import ctypes.util
import glob
import hashlib
import importlib
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "bool": 1}
ALIGNMENT = 256


# ----------------------------------------------------------------------------------------------------------------- CUDA
class Cuda:
    """The few calls of CUDA's runtime library that are needed, by ctypes."""

    def __init__(self):
        path = find_cudart()
        try:
            self.lib = ctypes.CDLL(path)
        except OSError as error:
            raise SystemExit(f"{path} cannot be loaded ({error}); set $CUDART to the path of libcudart.so") from error
        self.lib.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int(0)
        code = self.lib.cudaGetDeviceCount(ctypes.byref(count))
        if code or not count.value:
            raise SystemExit(f"there is no CUDA GPU here ({self.lib.cudaGetErrorString(code).decode()})")
        self.stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(self.stream))

    def call(self, name: str, *args):
        """Calls a function; ends with its error."""
        code = getattr(self.lib, name)(*args)
        if code:
            raise SystemExit(f"{name}: {self.lib.cudaGetErrorString(code).decode()} (CUDA error {code})")

    def allocate(self, num_bytes: int) -> int:
        """Zeroed memory on the GPU, for as long as the process lives."""
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(num_bytes, 1)))
        self.call("cudaMemset", pointer, 0, ctypes.c_size_t(max(num_bytes, 1)))
        return pointer.value

    def upload(self, address: int, array: np.ndarray):
        """Host to GPU, in the order of the stream."""
        array = np.ascontiguousarray(array)
        where, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self.call("cudaMemcpyAsync", ctypes.c_void_p(address), where, size, 1, self.stream)
        self.synchronize()  # the array may go away

    def download(self, array: np.ndarray, address: int):
        """GPU to host, after everything before it in the stream."""
        where, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self.call("cudaMemcpyAsync", where, ctypes.c_void_p(address), size, 2, self.stream)
        self.synchronize()

    def synchronize(self):
        """Waits for the stream."""
        self.call("cudaStreamSynchronize", self.stream)


def find_cudart() -> str:
    """The path of libcudart: $CUDART, the system's, or that of a package beside numpy (pip install nvidia-cuda-runtime)."""
    if os.environ.get("CUDART"):
        return os.environ["CUDART"]
    packages = [Path(entry) for entry in sys.path if entry.endswith("-packages")]
    places = [str(folder / "nvidia" / "*" / "lib" / "libcudart.so.*") for folder in packages]
    places += ["/usr/local/cuda*/lib64/libcudart.so.*", "/usr/lib/x86_64-linux-gnu/libcudart.so.*"]
    found = [path for place in places for path in sorted(glob.glob(place), reverse=True)]
    name = ctypes.util.find_library("cudart") or (found[0] if found else None)
    if name is None:
        raise SystemExit("CUDA's runtime library (libcudart.so) was not found; set $CUDART to its path")
    return name


# ---------------------------------------------------------------------------------------------------------------- files
def read_export(directory: Path, check: bool) -> dict:
    """The content of export.json; ends with a clear message where it does not fit. check: read every file."""
    file = directory / "export.json"
    if not file.is_file():
        raise SystemExit(
            f"{directory} has no export.json; write it with: camshaft export MODEL --format tensorrt -o DIR"
        )
    export = json.loads(file.read_text())
    if export.get("format") != "tensorrt" or export.get("camshaft_export") != 1:
        found = f"{export.get('format')} export, version {export.get('camshaft_export')}"
        raise SystemExit(f"{file} describes a {found}; this script runs tensorrt, 1")
    for name, facts in export["files"].items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != facts["bytes"]:
            raise SystemExit(f"{directory / name} is missing or cut short; copy or export it again")
        if check and sha256(directory / name) != facts["sha256"]:
            raise SystemExit(f"{directory / name} does not have the sha256 of export.json; copy or export it again")
    return export


def sha256(path: Path) -> str:
    """sha256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict:
    """Name -> bytes (a view of the mapped file): 8 bytes of header size, a JSON header, then the data."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, mode="r", offset=8 + size)
    header.pop("__metadata__", None)
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


# ---------------------------------------------------------------------------------------------------------------- batch
class Batch:
    """What the sequences of a batch have in the KV cache, and the inputs of the next step.

    A step takes S rows for each of B sequences; a sequence with fewer new tokens is padded at its end:

        token_ids [B, S]     10 11 12      last_rows [B]  2   the row whose logits are wanted
                             20  .  .                     0
    positions [B, S]: where each token stands in its sequence. Linear caches: consecutive, padding too, and never beyond
    max_seq_len (what padding writes lies behind the sequence, where nothing looks before it is overwritten). Paged caches: 0 for
    padding, with slot 0. block_tables [B, W]: the blocks of each sequence in order, unused entries 0. slot_mapping [B, S]:
    block * block_size + offset of each token. Block 0 belongs to no sequence: padding writes there.
    """

    def __init__(self, cache: dict, max_seq_len: int, num_sequences: int):
        self.lengths = np.zeros(num_sequences, np.int64)
        self.paged = cache["kind"] == "paged"
        self.block_size = cache.get("block_size") or 1
        width = -(-max_seq_len // self.block_size)
        if self.paged and cache["num_blocks"] < num_sequences * width + 1:
            # a server would hand blocks out as sequences grow; this script gives each sequence its share at the start
            width = (cache["num_blocks"] - 1) // num_sequences
        self.limit = width * self.block_size if self.paged else max_seq_len
        self.tables = np.zeros((num_sequences, -(-max_seq_len // self.block_size)), np.int64)
        self.tables[:, :width] = 1 + np.arange(num_sequences * width, dtype=np.int64).reshape(num_sequences, width)

    def inputs(self, new: list, num_rows: int, begin: int | None = None) -> dict:
        """The inputs for the new tokens of each sequence, padded to num_rows; they count as computed from here on.

        begin: position of the first row of every sequence; None: each sequence's own length.
        """
        shape = (len(new), num_rows)
        token_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        slots, last_rows = np.zeros(shape, np.int64), np.zeros(len(new), np.int64)
        for b, tokens in enumerate(new):
            count = len(tokens)
            where = (self.lengths[b] if begin is None else begin) + np.arange(num_rows)
            token_ids[b, :count] = tokens
            last_rows[b] = max(count - 1, 0)
            if self.paged:
                positions[b, :count] = where[:count]
                block = self.tables[b, where[:count] // self.block_size]
                slots[b, :count] = block * self.block_size + where[:count] % self.block_size
            else:
                positions[b] = where
            self.lengths[b] += count
        feeds = {"token_ids": token_ids, "positions": positions, "last_rows": last_rows}
        if self.paged:
            feeds |= {"slot_mapping": slots, "block_tables": self.tables}
        return feeds


# ---------------------------------------------------------------------------------------------------------------- model
class Program:
    """One engine, opened, with an address for each of its tensors."""

    def __init__(self, model: "Model", facts: dict):
        self.num_rows = facts["num_tokens"]
        data = (model.directory / facts["file"]).read_bytes()
        self.engine = model.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            built, here = model.export["tensorrt"]["version"], model.trt.__version__
            allowed = ", ".join(facts["compute_capabilities"])
            raise SystemExit(
                f"{facts['file']} cannot be opened: it was built with {model.export['tensorrt']['package']} {built} (here is "
                f"{here}) for compute capabilities {allowed}; export it again with the TensorRT of this machine"
            )
        self.context = self.engine.create_execution_context()
        self.inputs, self.outputs = facts["inputs"], facts["outputs"]
        self.own = {}
        for tensor in [*self.inputs, *self.outputs]:
            if "_cache" not in tensor["name"]:
                self.own[tensor["name"]] = model.cuda.allocate(num_bytes(tensor))
        (logits,) = [tensor for tensor in self.outputs if tensor["name"] == "logits"]
        self.logits = np.empty(logits["shape"], np.float32)
        for name, address in {**model.weights, **self.own}.items():
            self.bind(name, address)

    def bind(self, name: str, address: int):
        """Tells TensorRT where a tensor lies."""
        if not self.context.set_tensor_address(name, address):
            raise SystemExit(f"TensorRT does not take an address for {name}; export the model again")

    def run(self, model: "Model", feeds: dict) -> np.ndarray:
        """One step: the logits, on the host. The array is written again by the next step."""
        for tensor in self.inputs:
            if tensor["name"] in feeds:
                model.cuda.upload(self.own[tensor["name"]], feeds[tensor["name"]].astype(tensor["dtype"]))
        for name, address in model.caches.items():
            self.bind(name, address)
        for tensor in self.outputs:
            if "updates" in tensor:
                self.bind(tensor["name"], model.spare[tensor["updates"]])
        if not self.context.execute_async_v3(model.cuda.stream.value):
            raise SystemExit("TensorRT could not start the engine; its messages are above")
        model.cuda.download(self.logits, self.own["logits"])
        model.caches, model.spare = model.spare, model.caches
        return self.logits


def num_bytes(tensor: dict) -> int:
    """Bytes of a tensor of export.json."""
    return int(np.prod(tensor["shape"])) * BYTES[tensor["dtype"]]


class Model:
    """The engines of an export with the weights and caches that they share."""

    def __init__(self, directory: Path, export: dict, in_place: bool):
        self.directory, self.export = directory, export
        package = export["tensorrt"]["package"]
        try:
            self.trt = importlib.import_module(package)
        except ImportError as error:
            wanted = f"{package} {export['tensorrt']['version']}"
            raise SystemExit(
                f"{package} cannot be imported ({error}); install it: {wanted} built these engines"
            ) from error
        self.cuda = Cuda()
        self.runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING))
        self.weights = {}
        if export["weights"]["file"]:
            for name, data in read_safetensors(directory / export["weights"]["file"]).items():
                self.weights[name] = self.cuda.allocate(-(-len(data) // ALIGNMENT) * ALIGNMENT)
                self.cuda.upload(self.weights[name], data)
        caches = [tensor for tensor in export["programs"][0]["inputs"] if "_cache." in tensor["name"]]
        # zeros: entries that were never written are masked, and must be finite
        self.caches = {tensor["name"]: self.cuda.allocate(num_bytes(tensor)) for tensor in caches}
        if export["cache"]["kind"] == "linear" or in_place:
            self.spare = self.caches  # KVCacheUpdate writes where its input lies
        else:  # blocks are scattered into a copy; caches and spare change places after each step
            self.spare = {tensor["name"]: self.cuda.allocate(num_bytes(tensor)) for tensor in caches}
        programs = {facts["name"]: Program(self, facts) for facts in export["programs"]}
        self.prefill, self.decode = programs["prefill"], programs["decode"]
        self.batch = Batch(export["cache"], export["max_seq_len"], export["batch_size"])

    def read_prompts(self, prompts: list) -> np.ndarray:
        """Computes the prompts chunk by chunk; returns the logits [B, vocabulary] after each prompt's last token."""
        size = self.prefill.num_rows
        result = np.zeros((len(prompts), self.export["model"]["vocab_size"]), np.float32)
        for begin in range(0, max(len(prompt) for prompt in prompts), size):
            feeds = self.batch.inputs([prompt[begin : begin + size] for prompt in prompts], size, begin)
            logits = self.chosen(self.prefill.run(self, feeds), feeds)
            for b, prompt in enumerate(prompts):
                if begin < len(prompt) <= begin + size:
                    result[b] = logits[b]
        return result

    def step(self, tokens: list) -> np.ndarray:
        """Computes one token of each sequence; returns the logits [B, vocabulary]."""
        feeds = self.batch.inputs([[token] for token in tokens], 1)
        return self.chosen(self.decode.run(self, feeds), feeds)

    def chosen(self, logits: np.ndarray, feeds: dict) -> np.ndarray:
        """The wanted row of each sequence."""
        return logits[np.arange(len(logits)), feeds["last_rows"]] if self.export["logits"] == "all" else logits


def generate(model: Model, prompts: list, max_tokens: int, eos: set) -> list:
    """Greedy tokens for each prompt, without the end token; a finished sequence goes on in the batch, unheard."""
    tokens: list = [[] for _ in prompts]
    done = [False] * len(prompts)
    idle = [[0]] * (model.export["batch_size"] - len(prompts))  # places of the batch that nobody uses
    logits = model.read_prompts([*prompts, *idle])
    for count in range(1, max_tokens + 1):
        chosen = logits.argmax(axis=-1).tolist()
        for b in range(len(prompts)):
            done[b] = done[b] or chosen[b] in eos
            if not done[b]:
                tokens[b].append(chosen[b])
        if all(done) or count == max_tokens:
            break
        logits = model.step(chosen)
    return tokens


def main() -> None:
    """Reads the command line and generates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what `camshaft export --format tensorrt` wrote")
    parser.add_argument(
        "--ids", action="append", default=[], help="token ids of a prompt, with commas; may be repeated"
    )
    parser.add_argument("--text", action="append", default=[], help="a prompt as text; needs the package tokenizers")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    parser.add_argument("--check", action="store_true", help="only compare every file with its sha256")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="paged caches: bind the updated cache to the memory of the old one (half the memory; seen to work on an H200, "
        "not promised by TensorRT)",
    )
    options = parser.parse_args()
    export = read_export(options.directory, options.check)
    if options.check:
        print(json.dumps({"ok": True, "files": len(export["files"])}))
        return
    prompts = [[int(item) for item in text.split(",")] for text in options.ids]
    tokenizer = None
    if options.text:
        from tokenizers import Tokenizer  # pip install tokenizers

        tokenizer = Tokenizer.from_file(str(options.directory / "tokenizer" / "tokenizer.json"))
        prompts += [tokenizer.encode(text).ids for text in options.text]
    if not prompts or not all(prompts):
        parser.error("give at least one prompt of one token or more, with --ids or --text")
    if len(prompts) > export["batch_size"]:
        parser.error(f"{len(prompts)} prompts; the engines were built for a batch of {export['batch_size']}")
    vocabulary = export["model"]["vocab_size"]
    if any(not 0 <= token < vocabulary for prompt in prompts for token in prompt):
        parser.error(f"token ids are 0 to {vocabulary - 1}")
    limit = Batch(export["cache"], export["max_seq_len"], export["batch_size"]).limit
    longest = max(len(prompt) for prompt in prompts) + options.max_tokens
    if longest > limit:
        parser.error(f"the longest prompt and {options.max_tokens} tokens are {longest}; there is room for {limit}")
    eos = set() if options.ignore_eos else set(export["model"]["eos_token_ids"])
    tokens = generate(Model(options.directory, export, options.in_place), prompts, options.max_tokens, eos)
    result: dict = {"tokens": tokens}
    if tokenizer is not None:
        result["texts"] = [tokenizer.decode(row) for row in tokens[len(options.ids) :]]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
