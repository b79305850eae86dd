"""One invocation of `camshaft bench run`: the engine is made or opened, its cases are measured, documents are written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_tables import profile_tables, result_table, start_up_line
from .common import Output, engine_facts, err, open_engine, resolve_model

if TYPE_CHECKING:
    from ..export.engine import Engine
    from ..runtime.bench.cases import Case
    from ..runtime.bench.measure import Repeat
    from ..runtime.bench.session import Session
    from ..runtime.speculative.config import SpeculativeConfig


@dataclass(kw_only=True)
class Invocation:
    """What was asked for on the command line; `build`: keyword arguments of `camshaft.compile`, None where not given."""

    model: str | None
    random_weights: str | None
    seed: int
    cases: Sequence[Case]
    is_suite: bool
    build: Mapping[str, Any]
    text: Path | None = None
    baseline: str | None = None
    out: Path | None = None
    save: Path | None = None
    trace: Path | None = None
    speculative: SpeculativeConfig | None = None
    opened: dict[str, float] = field(default_factory=dict)
    """Seconds: build_s of a model that was compiled, load_s of an engine that was opened."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.random_weights is None):
            raise ValueError(
                "what shall be measured? Give an engine or a model, or --random-weights CONFIG, one of the two"
            )
        if self.baseline not in (None, "transformers"):
            raise ValueError(f"--baseline is {self.baseline!r}; allowed: transformers")
        if self.baseline and (self.model is None or self._is_engine):
            raise ValueError(
                f"{self.model or 'a shape with random weights'} is no model on disk, and Transformers needs the model: give "
                "its Hugging Face directory (or demo)"
            )
        if self.baseline and (self.is_suite or self.cases[0].mode == "load"):
            raise ValueError("--baseline goes with one case, all at once or --latency; leave out --suite and --load")
        if self.save is not None and self._is_engine:
            raise ValueError(f"{self.model} is a saved engine already; leave out --save")

    @property
    def _is_engine(self) -> bool:
        return self.model is not None and (Path(self.model) / "manifest.json").is_file()

    def run(self, to: Output) -> None:
        """Measures all cases, and prints and writes what they gave, each as soon as it is there."""
        from ..runtime.bench.session import Session

        engine = self._open()
        for case in self.cases:
            case.workload.check_fits(engine.max_seq_len)
        if self.save is not None:
            engine.save(self.save)
        documents = []
        tokens = _text_tokens(engine, self.text)
        with Session(engine, text_tokens=tokens, tell=_tell, trace=self.trace, speculative=self.speculative) as session:
            for case in self.cases:
                documents.append(self._measure(session, case))
                self._show(to, documents[-1])
                self._write(case, documents[-1])
            # behind all that is timed, and from the last case on, whose LLM is open
            for case, document in zip(reversed(self.cases), reversed(documents)):
                if case.profile_steps:
                    self._profile(to, session, case, document)
        to.document = {"kind": "camshaft-bench-suite", "documents": documents} if self.is_suite else documents[0]

    def _open(self) -> Engine:
        import camshaft

        start = time.perf_counter()
        if self.random_weights is not None:
            from ..models.random_weights import RandomWeights

            given = {name: value for name, value in self.build.items() if value is not None}
            shape = RandomWeights.of(self.random_weights, seed=self.seed, device=self.build["device"])
            if self.speculative is not None:
                from ..runtime.speculative.build import target_options

                given = {**target_options(self.speculative, shape), **given}
            engine: Engine = camshaft.compile(shape, **given)
        else:
            assert self.model is not None
            engine = open_engine(self.model, self.build, speculative=self.speculative)
        self.opened["load_s" if self._is_engine else "build_s"] = time.perf_counter() - start
        return engine

    def _measure(self, session: Session, case: Case) -> dict[str, Any]:
        from ..runtime.bench.document import make_document
        from ..runtime.bench.roofline import shape_facts

        engine: Engine = session.engine
        results = session.measure(case)
        if self.baseline:
            session.close()  # both would want the device's memory
            results.extend(self._measure_transformers(session, case))
        return make_document(
            model={**engine_facts(engine), "shape": shape_facts(engine)},
            workload=case.workload,
            results=results,
            case=case.name,
            opened=dict(self.opened),
            build_timings=dict(engine.manifest.timings),
        )

    def _measure_transformers(self, session: Session, case: Case) -> list[dict[str, Any]]:
        """Transformers' results on the same requests."""
        from transformers.utils import logging as transformers_logging

        from ..runtime.bench.document import result_entry
        from ..runtime.bench.peer import TransformersPeer, run_peer

        assert self.model is not None
        transformers_logging.disable_progress_bar()
        config, workload = session.engine.config, case.workload
        peer = TransformersPeer(
            resolve_model(self.model), dtype=config.dtype, device=config.device, ignore_eos=workload.ignore_eos
        )
        if case.mode == "latency":
            for _ in range(case.warmup):
                peer.latency(session.requests(workload, -1)[:1])
            runs = []
            for index in range(case.repeats):
                runs.append(peer.latency(session.requests(workload, index)))
                _tell("transformers", index, runs[-1])
            return [result_entry("transformers, one by one", "latency", runs, batch_size=1)]
        measured = run_peer(
            peer,
            lambda index: session.requests(workload, index),
            repeats=case.repeats,
            warmup=case.warmup,
            on_run=_tell,
        )
        return [result_entry(name, "throughput", runs, batch_size=size) for name, size, runs in measured]

    def _profile(self, to: Output, session: Session, case: Case, document: dict[str, Any]) -> None:
        from ..runtime.bench.document import label_of

        results = [result for result in document["results"] if result["system"] == "camshaft"]
        session.profile(case, results)
        for result in results:
            label = label_of(result) if not self.is_suite else f"{case.name}: {label_of(result)}"
            for made in profile_tables(result["profile"], label):
                to.console.print(made)
        self._write(case, document)

    def _show(self, to: Output, document: Mapping[str, Any]) -> None:
        to.console.print(result_table(document))
        results = document["results"]
        if self.baseline:
            best = max(results[1:], key=lambda result: result["summary"]["output_tok_s"]["median"])
            ratio = results[0]["summary"]["output_tok_s"]["median"] / best["summary"]["output_tok_s"]["median"]
            to.print(f"camshaft: {ratio:.2f} times the output tokens/s of {best['system']}", style="bold")
        to.print(start_up_line(document), style="dim")

    def _write(self, case: Case, document: Mapping[str, Any]) -> None:
        if self.out is None:
            return
        path = self.out / f"{case.name}.json" if self.is_suite else self.out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        err().print(f"written to {path}", style="dim", highlight=False)


def _text_tokens(engine: Engine, text: Path | None) -> list[int] | None:
    if text is None:
        return None
    from ..runtime.tokenizer import Tokenizer

    if engine.tokenizer_path is None:
        raise ValueError("--text needs a tokenizer and this engine has none; leave it out for random tokens")
    return Tokenizer.from_dir(engine.tokenizer_path).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)


def _tell(label: str, index: int, metrics: Repeat) -> None:
    err().print(
        f"{label}, run {index + 1}: {metrics['output_tok_s']:.1f} output tokens/s", style="dim", highlight=False
    )
