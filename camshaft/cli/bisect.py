"""`camshaft bisect`: which pass, or which segment of which target, computes something else?"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    BlockSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Output,
    output,
    resolve_model,
    table,
)

if TYPE_CHECKING:
    from ..export.bisect import TargetBisection
    from ..graph.program import Program
    from ..passes.bisect import PassBisection

EXAMPLES = "Example: [bold]camshaft bisect demo --target onnxruntime[/]"


def bisect(
    model: ModelArgument,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help='Targets to compare (may be given several times), "all", or "none"; default: those that "auto" chooses from.',
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Largest allowed difference, as a share of the largest value; default: by dtype, 1e-3 for float32.",
            show_default=False,
        ),
    ] = None,
    num_tokens: Annotated[int, typer.Option("--num-tokens", min=4, help="Length of the random prompt.")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="Of the random prompt.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    block_size: BlockSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the first pass, or the first segment of a target, whose result differs from the model's.

    The passes run one by one, and every program is compared with the captured one; then every segment that a target
    lowers is compared with plain PyTorch on the same inputs. Exit code 1 if something differs.
    """
    with output(as_json) as to:
        _bisect(to, resolve_model(model), target or [], tolerance, num_tokens, seed, device, dtype, block_size or 16)


def _bisect(
    to: Output,
    model: str,
    targets: list[str],
    tolerance: float | None,
    num_tokens: int,
    seed: int,
    device_name: str | None,
    dtype_name: str | None,
    block_size: int,
) -> None:
    from ..export.bisect import TOLERANCES, bisect_target
    from ..export.build import resolve_device, resolve_dtype
    from ..models.huggingface import open_model, trace_decoder
    from ..passes.bisect import bisect_passes
    from ..passes.pipeline import decoder_passes
    from .progress import progress_bar

    device = resolve_device(device_name)
    dtype = resolve_dtype(dtype_name, device)
    names = _targets(targets, device)
    allowed = TOLERANCES[str(dtype).removeprefix("torch.")] if tolerance is None else tolerance
    with progress_bar() as report:
        report("opening and tracing the model", 0, 0)
        program: Program = trace_decoder(open_model(model, dtype))
        passes = decoder_passes(block_size=block_size, fuse_rope=device.type == "cuda")
        done: list[str] = []

        def on_check(check: Any) -> None:
            done.append(check.name)
            report("comparing passes", len(done), len(passes))

        found = bisect_passes(program, passes, tolerance=allowed, num_tokens=num_tokens, seed=seed, on_check=on_check)
    _print_passes(to, found)
    results: list[TargetBisection] = []
    if found.program.cache is not None:
        for name in names:
            with progress_bar() as report:
                results.append(
                    bisect_target(
                        found.program,
                        name,
                        device=device,
                        tolerance=allowed,
                        num_tokens=num_tokens,
                        seed=seed,
                        on_progress=report,
                    )
                )
            _print_target(to, results[-1])
    to.document = _document(found, results)
    for line in findings(found, results):
        to.print(line, style="bold red")
    if not to.document["ok"]:
        raise typer.Exit(1)
    compared = f" and targets {', '.join(names)}" if names else ""
    to.print(f"all {len(found.checks)} passes{compared} agree within {allowed:g}", style="bold green")


def _targets(asked: list[str], device: Any) -> list[str]:
    """Names of the targets to compare. Raises ValueError for one that does not exist or cannot run here."""
    from ..export.targets.base import available_targets, get_target

    usable = [name for name, why in available_targets(device).items() if why is None]
    if not asked:
        slow = "inductor" if device.type == "cpu" else "onnxruntime"
        return [name for name in usable if name != slow]
    if asked == ["none"]:
        return []
    if asked == ["all"]:
        return usable
    for name in asked:
        reason = get_target(name).unavailable(device)
        if reason is not None:
            raise ValueError(
                f"target {name} cannot run on {device.type}: {reason}. Targets that can: {', '.join(usable)}"
            )
    return asked


def _error_text(error: float) -> str:
    return "-" if math.isinf(error) else f"{error:.2g}"


def _print_passes(to: Output, found: PassBisection) -> None:
    rows = [
        [c.index, c.name, c.stage, c.num_matches, _error_text(c.error), "ok" if c.ok else c.problem or "DIFFERS"]
        for c in found.checks
    ]
    title = "Passes, each compared with the captured program"
    to.console.print(table(title, ["", "pass", "stage", "matches", "error", ""], rows, left=(1, 2, 5)))


def _print_target(to: Output, result: TargetBisection) -> None:
    worst: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for check in result.checks:
        key = check.segment if check.what == "segment" else "attention"
        counts[key] = counts.get(key, 0) + 1
        if key not in worst or check.error > worst[key].error:
            worst[key] = check
    rows = [
        [
            key,
            counts[key],
            _error_text(c.error),
            "ok" if c.ok else c.problem or f"DIFFERS at step {c.step}",
            c.operators,
        ]
        for key, c in worst.items()
    ]
    title = f"Target {result.target}, each segment compared with eager (logits at the end: {_error_text(result.logits_error)})"
    to.console.print(table(title, ["segment", "runs", "worst error", "", "mostly"], rows, left=(0, 3, 4)))


def findings(found: PassBisection, results: list[TargetBisection]) -> list[str]:
    """One line for each thing that is off: the first bad pass, and the first bad step of each target."""
    lines = []
    bad = found.first_bad
    if bad is not None:
        how = (
            bad.problem
            or f"its output differs from the captured program by {bad.error:.2g} (allowed {found.tolerance:g})"
        )
        lines.append(f"pass {bad.index}, {bad.name}: {how}")
        if found.program.cache is None:
            lines.append("the targets were not compared: the program did not get past that pass")
    for result in results:
        step = result.first_bad
        if step is not None:
            how = (
                step.problem
                or f"differs from eager by {step.error:.2g} on the same inputs (allowed {result.tolerance:g})"
            )
            name = f"segment {step.segment}" if step.what == "segment" else step.segment
            lines.append(f"target {result.target}, {name} (step {step.step}; {step.operators}): {how}")
        elif not result.ok:
            lines.append(
                f"target {result.target}: each segment is within {result.tolerance:g}, but the errors add up to "
                f"{result.logits_error:.2g} in the logits; a higher precision, or a higher --tolerance"
            )
    return lines


def _finite(value: Any) -> Any:
    """inf as None: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _document(found: PassBisection, results: list[TargetBisection]) -> dict[str, Any]:
    bad = found.first_bad
    targets = [
        {
            "target": result.target,
            "ok": result.ok,
            "logits_error": result.logits_error,
            "first_bad": None if result.first_bad is None else dataclasses.asdict(result.first_bad),
            "steps": [dataclasses.asdict(check) for check in result.checks],
        }
        for result in results
    ]
    document = {
        "ok": bad is None and all(result.ok for result in results),
        "tolerance": found.tolerance,
        "first_bad_pass": None if bad is None else dataclasses.asdict(bad),
        "passes": [dataclasses.asdict(check) for check in found.checks],
        "targets": targets,
        "findings": findings(found, results),
    }
    made: dict[str, Any] = _finite(document)
    return made
