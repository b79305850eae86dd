"""`camshaft demo`: the bundled model, compiled and at work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .build import engine_sizes, segment_table, timings_text
from .common import DeviceOption, Output, TargetOption, output, pass_table
from .generate import stream_one

if TYPE_CHECKING:
    from ..export.engine import Engine

EXAMPLES = 'Next: [bold]camshaft build demo -o demo.engine[/] and [bold]camshaft generate demo.engine "A list is"[/]'


def demo(
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Texts to write.")] = 4,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of each text.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.6,
    seed: Annotated[int, typer.Option("--seed", help="Other seeds write other texts.")] = 0,
    target: TargetOption = None,
    device: DeviceOption = None,
) -> None:
    """Compile the bundled model and let it write: what Camshaft does, in one command and without a network."""
    with output(False) as to:
        _demo(to, num_prompts, max_tokens, temperature, seed, target, device)


def _demo(
    to: Output, num_prompts: int, max_tokens: int, temperature: float, seed: int, target: str | None, device: str | None
) -> None:
    start = time.perf_counter()
    import camshaft

    from ..models import demo as bundled

    engine: Engine = camshaft.compile("demo", target=target or "auto", device=device)
    _explain(to, engine, time.perf_counter() - start)
    with camshaft.LLM(engine) as llm:
        to.print(str(llm.memory))
        to.print()
        params = camshaft.SamplingParams(temperature=temperature, top_p=0.95, max_tokens=max_tokens, seed=seed)
        prompts = choose_prompts(bundled.prompts(), num_prompts)
        begin = time.perf_counter()
        handles = [llm.generate_async(item["chat"] if "chat" in item else item["text"], params) for item in prompts]
        results = []
        for item, handle in zip(prompts, handles):
            chat = "chat" in item
            heading = f"> {item['chat'][-1]['content']}" if chat else item["text"]
            results.append(stream_one(handle, heading, chat))
        seconds = time.perf_counter() - begin
        stats = llm.stats()
    num_tokens = sum(len(result.token_ids) for result in results)
    to.print(
        f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens/s, {len(results)} requests "
        f"batched in flight over {stats.scheduler.steps} steps",
        style="bold",
    )
    to.print("(a very small model, trained on free documentation: it writes like a manual and knows nothing)")


def _explain(to: Output, engine: Engine, seconds: float) -> None:
    manifest = engine.manifest
    facts, build = manifest.model, manifest.build
    to.print(
        f"{facts.architecture}, {facts.num_parameters / 1e6:.1f} M parameters, target {build.target} on {build.device}, "
        f"{build.dtype}: ready in {seconds:.1f} s",
        style="bold",
    )
    to.print("time: " + timings_text(manifest.timings))
    to.console.print(pass_table(manifest.passes))
    to.console.print(segment_table(engine.plan, manifest, engine_sizes(engine), operators=False))


def choose_prompts(entries: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the prompts ({"text": ...} or {"chat": [...]} each), half of them chats, spread over the list."""
    texts = [entry for entry in entries if "text" in entry]
    chats = [entry for entry in entries if "chat" in entry]
    num_chats = min(count // 2, len(chats))
    chosen = [*_spread(texts, count - num_chats), *_spread(chats, num_chats)]
    return chosen[:count]


def _spread(entries: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    count = min(count, len(entries))
    return [entries[index * len(entries) // count] for index in range(count)]
