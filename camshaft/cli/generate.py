"""`camshaft generate`: texts from an engine or a model."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    BatchInvariantOption,
    BatchTokensOption,
    BlockSizeOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    EngineOrModelArgument,
    GroupOption,
    JsonOption,
    KvBytesOption,
    KvDtypeOption,
    Output,
    QuantizeOption,
    SeqLenOption,
    SequencesOption,
    TargetOption,
    err,
    open_engine,
    output,
    parse_bytes,
    quantize_options,
)
from .speculative import (
    AcceptanceOption,
    AdaptiveOption,
    DraftModelOption,
    ExitLayerOption,
    NumDraftOption,
    SpeculativeOption,
    acceptance_line,
    metrics_facts,
    speculative_config,
)

if TYPE_CHECKING:
    from ..runtime import LLM, SamplingParams
    from ..runtime.async_llm import RequestHandle
    from ..runtime.outputs import RequestOutput

EXAMPLES = 'Examples: [bold]camshaft generate demo "A dictionary maps"[/] or [bold]camshaft generate demo --chat[/]'


def generate(
    model: EngineOrModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help='Prompts, answered together; "-": one prompt per line of stdin.',
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Each prompt is a message to a chat model; without one, a conversation on the terminal."
        ),
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens of each output.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: always the likeliest token; higher: more varied.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Choose among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Choose among the likeliest tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes the texts repeatable.", show_default=False)] = None,
    n: Annotated[int, typer.Option("--n", help="Texts for each prompt.")] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End a text before this string (may be given several times).", show_default=False),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show text while it is made.")] = True,
    speculative: SpeculativeOption = None,
    draft_model: DraftModelOption = None,
    exit_layer: ExitLayerOption = None,
    num_draft_tokens: NumDraftOption = 4,
    acceptance: AcceptanceOption = "rejection",
    adaptive: AdaptiveOption = True,
    kv_cache_bytes: KvBytesOption = None,
    target: TargetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_seq_len: SeqLenOption = None,
    max_batch_tokens: BatchTokensOption = None,
    max_sequences: SequencesOption = None,
    block_size: BlockSizeOption = None,
    quantize: QuantizeOption = None,
    group: GroupOption = None,
    calibration: CalibrationOption = None,
    kv_cache_dtype: KvDtypeOption = None,
    batch_invariant: BatchInvariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Complete prompts, or chat. All prompts run together, batched in flight."""
    from ..runtime.sampling_params import SamplingParams

    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
    )
    drafting = speculative_config(speculative, draft_model, exit_layer, num_draft_tokens, acceptance, adaptive)
    texts = _read_prompts(prompts or [], chat, as_json)
    with output(as_json) as to:
        build = {
            "target": target,
            "device": device,
            "dtype": dtype,
            "max_seq_len": max_seq_len,
            "max_batch_tokens": max_batch_tokens,
            "max_sequences": max_sequences,
            "block_size": block_size,
            **quantize_options(quantize, group, calibration),
            "kv_cache_dtype": kv_cache_dtype,
            "batch_invariant": batch_invariant,
        }
        engine = open_engine(model, build, speculative=drafting)
        from ..runtime import LLM

        with LLM(engine, kv_cache_bytes=parse_bytes(kv_cache_bytes, "--kv-cache-bytes"), speculative=drafting) as llm:
            if texts is None:
                _converse(llm, params)
                return
            _run(llm, texts, params, chat=chat, stream=stream and not as_json, to=to)


def _read_prompts(prompts: Sequence[str], chat: bool, as_json: bool) -> list[str] | None:
    """The prompts; None: a conversation on the terminal. Raises ValueError where there are none."""
    texts: list[str] = []
    for prompt in prompts:
        texts.extend([line.rstrip("\n") for line in sys.stdin if line.strip()] if prompt == "-" else [prompt])
    if texts:
        return texts
    if chat and not prompts and sys.stdin.isatty() and not as_json:
        return None
    raise ValueError('no prompt; give one or more, "-" to read them from stdin (one per line), or --chat on a terminal')


def _run(llm: LLM, texts: Sequence[str], params: SamplingParams, *, chat: bool, stream: bool, to: Output) -> None:
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts] if chat else list(texts)
    start = time.perf_counter()
    if stream and params.n == 1:
        handles = [llm.generate_async(prompt, params) for prompt in prompts]
        results = [
            stream_one(handle, text if len(texts) > 1 or not chat else "", chat) for handle, text in zip(handles, texts)
        ]
    else:
        results = llm.generate(prompts, params)
        for result, text in zip(results, texts):
            _print_result(to, result, text, chat)
    seconds = time.perf_counter() - start
    num_tokens = sum(len(sample.token_ids) for result in results for sample in result.outputs)
    to.document = {
        "outputs": [_result_document(result, text) for result, text in zip(results, texts)],
        "num_tokens": num_tokens,
        "seconds": seconds,
        "sampling": dataclasses.asdict(params),
    }
    metrics = llm.stats().speculative
    if metrics is not None:
        to.document["speculative"] = metrics_facts(metrics)
    line = acceptance_line(metrics)
    if line is not None and not to.as_json:
        err().print(line, style="dim", highlight=False)
    if not to.as_json:
        err().print(
            f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s", style="dim", highlight=False
        )


def stream_one(handle: RequestHandle, heading: str, chat: bool = False) -> RequestOutput:
    """Writes a prompt (dim on a terminal) and its text to stdout while the text comes; returns the whole result."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    if heading:
        sys.stdout.write(f"{dim}{heading}{plain}" + ("\n" if chat else ""))
        sys.stdout.flush()
    for increment in handle:
        sys.stdout.write(increment.text)
        sys.stdout.flush()
    sys.stdout.write("\n\n" if heading else "\n")
    sys.stdout.flush()
    return handle.result()


def _print_result(to: Output, result: RequestOutput, text: str, chat: bool) -> None:
    for sample in result.outputs:
        number = f"[{sample.index}] " if len(result.outputs) > 1 else ""
        to.print(f"{number}{text}" + ("\n" if chat else "") + sample.text + "\n")


def _result_document(result: RequestOutput, text: str) -> dict[str, Any]:
    metrics = result.metrics
    return {
        "prompt": text,
        "num_prompt_tokens": len(result.prompt_token_ids),
        "outputs": [
            {"text": s.text, "token_ids": s.token_ids, "finish_reason": s.finish_reason, "stop_reason": s.stop_reason}
            for s in result.outputs
        ],
        "time_to_first_token_s": metrics.time_to_first_token_s,
        "num_cached_tokens": metrics.num_cached_tokens,
    }


def _converse(llm: LLM, params: SamplingParams) -> None:
    """A conversation on the terminal: an empty line is skipped, /new starts over, /exit or Ctrl-D ends it."""
    print("Chat: /new starts over, /exit ends, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/new":
            messages = []
        if not text or text == "/new":
            continue
        messages.append({"role": "user", "content": text})
        handle = llm.generate_async(messages, params)
        try:
            answer = stream_one(handle, "").text
        except KeyboardInterrupt:
            handle.abort()
            answer = handle.result().text
            print()
        messages.append({"role": "assistant", "content": answer})
