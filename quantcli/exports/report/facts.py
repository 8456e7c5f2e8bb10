"""What a report says of each artifact, read from the artifact, its evaluation and its source."""

from __future__ import annotations

import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantcli.artifacts.write import default_threads
from quantcli.errors import QuantcliError, SourceError
from quantcli.events import Events, take
from quantcli.exports.cards import base_model, languages, plain, recorded_keys, types_text
from quantcli.exports.report.sensitivity import LAYER, Sensitivity, by_block
from quantcli.exports.verify import VerificationDone, verify
from quantcli.model import Model, open_model
from quantcli.plan.planner import make_plan
from quantcli.plan.recipe import make_recipe
from quantcli.plan.schemes import has_types
from quantcli.report.stats import Channel
from quantcli.report.weights import WeightSource, WeightStatsDone, measure_weights
from quantcli.run.outputs import KindsChosen
from quantcli.types import Note, OutputTensor

_CHANNELS = 12


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor of an artifact; ``error`` is relative to the source's root mean square."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    error: float | None = None
    reason: str = ""
    """Why it got its type, where the recipe tells."""
    cost: float | None = None
    """The KL divergence that this is estimated to cost, in nats, where costs were measured."""

    @property
    def layer(self) -> int | None:
        """The number of its block."""
        found = LAYER.match(self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """One artifact. ``nbytes`` are of its files, ``measured`` its results by text."""

    name: str
    nbytes: int
    bits: float
    types: str
    recipe: str | None
    digest: str | None
    calibration: tuple[tuple[str, str], ...]
    tensors: tuple[TensorFacts, ...]
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    speed: Mapping[str, Any] | None = None
    sensitivity: tuple[Sensitivity, ...] = ()

    def layer_errors(self) -> list[tuple[int, float]]:
        """Root mean square of the relative errors of each block's matrices."""
        squares: dict[int, list[float]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.layer is not None and tensor.error is not None and len(tensor.shape) > 1:
                squares[tensor.layer].append(tensor.error**2)
        return [(n, math.sqrt(sum(s) / len(s))) for n, s in sorted(squares.items())]


@dataclass(frozen=True, slots=True)
class Outlier:
    """A column of a matrix of the source whose weights stand out."""

    tensor: str
    channel: Channel


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """Everything that the page and the card say. ``base`` is the model that all were made from."""

    title: str
    arch: str
    parameters: int
    base: str | None
    license: str | None
    languages: tuple[str, ...]
    artifacts: tuple[ArtifactFacts, ...]
    texts: tuple[str, ...]
    reference: str | None
    outliers: tuple[Outlier, ...] = ()


def gather(
    artifacts: Sequence[Path], evaluation: Mapping[str, Any] | None, against: str | Path | None,
    *, chosen: Sequence[KindsChosen] = (), threads: int | None = None,
) -> Events[ReportFacts]:  # fmt: skip
    """Read everything; yields progress and notes.

    ``against`` is the model of which they are quantizations: each tensor's error is measured
    against it, which decodes all weights. ``chosen`` has what kinds cost, of those artifacts for
    which it was measured. SourceError when an artifact cannot be read.
    """
    found: list[ArtifactFacts] = []
    first: tuple[str, int, Any] | None = None
    for path in artifacts:
        with open_model(path, vocabulary=False) as model:
            if first is None:
                first = (
                    model.arch,
                    sum(each.elements for each in model.tensors),
                    recorded_keys(model),
                )
            errors: Mapping[str, float | None] = {}
            reasons: Mapping[str, tuple[str, str]] = {}
            if against is not None:
                errors = yield from _errors(model, against, threads or default_threads())
                reasons = _reasons(plain(recorded_keys(model), "quantcli.recipe"), against)
            choice = next((each for each in chosen if path in each.paths), None)
            found.append(_artifact(path, model, errors, reasons, evaluation, choice))
    if first is None:
        raise SourceError("a report needs an artifact")
    arch, parameters, keys = first
    outliers: tuple[Outlier, ...] = ()
    if against is not None:
        with open_model(against, vocabulary=False) as source:
            outliers = yield from _outliers(source, threads or default_threads())
    base = base_model(keys)
    reference = evaluation.get("reference") if evaluation else None
    return ReportFacts(
        base.rpartition("/")[2] if base else _common_name([each.name for each in found]),
        arch, parameters, base, plain(keys, "general.license"), tuple(languages(keys)),
        tuple(sorted(found, key=lambda each: each.nbytes)),
        tuple(dict.fromkeys(text for each in found for text in each.measured)),
        Path(reference).name if reference else None,
        outliers,
    )  # fmt: skip


def _artifact(
    path: Path,
    model: Model,
    errors: Mapping[str, float | None],
    reasons: Mapping[str, tuple[str, str]],
    evaluation: Mapping[str, Any] | None,
    choice: KindsChosen | None,
) -> ArtifactFacts:
    keys = recorded_keys(model)
    stored = sum(map(model.stored_bytes, model.tensors))
    calibration = [
        (name, text)
        for name, key in (
            ("importance matrix", "quantize.imatrix.file"),
            ("its text", "quantize.imatrix.dataset"),
            ("its windows", "quantize.imatrix.chunks_count"),
            ("tensors it covers", "quantize.imatrix.entries_count"),
        )
        if (text := plain(keys, key)) is not None
    ]
    return ArtifactFacts(
        path.resolve().name,
        _size(path, stored),
        8 * stored / max(1, sum(tensor.elements for tensor in model.tensors)),
        types_text(model),
        plain(keys, "quantcli.recipe"),
        plain(keys, "quantcli.source.digest"),
        tuple(calibration),
        tuple(
            _tensor(model, each, errors.get(each.name), reasons.get(each.name, ("", "")), choice)
            for each in model.tensors
        ),
        _of_artifact(evaluation, "results", path),
        next(iter(_of_artifact(evaluation, "speeds", path).values()), None),
        by_block(choice.costs) if choice is not None else (),
    )


def _tensor(
    model: Model,
    tensor: OutputTensor,
    error: float | None,
    reason: tuple[str, str],
    choice: KindsChosen | None,
) -> TensorFacts:
    kind, why = reason
    cost = None
    if choice is not None and tensor.name in choice.kinds:
        cost = choice.costs.get(tensor.name, {}).get(choice.kinds[tensor.name])
    # A type that was chosen otherwise (by its cost, say) has another reason than the plan's.
    return TensorFacts(
        tensor.name, tensor.shape, tensor.dtype, model.stored_bytes(tensor), error,
        why if kind == tensor.dtype else "", cost,
    )  # fmt: skip


def _reasons(recipe: str | None, against: str | Path) -> dict[str, tuple[str, str]]:
    """The type and its reason by tensor, from a plan of the recorded recipe, if there is one."""
    if recipe is None:
        return {}
    try:
        wanted = replace(make_recipe(tomllib.loads(recipe)), imatrix=None, chat_template=None)
        if not has_types(wanted.to):
            return {}
        with open_model(against, vocabulary=False) as source:
            plan = make_plan(source.tensors, source.metadata, wanted)
    except (QuantcliError, tomllib.TOMLDecodeError):
        return {}
    return {item.tensor.name: (item.format, item.reason) for item in plan.items}


def _size(path: Path, stored: int) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.glob("*.safetensors"))
    # Of a split GGUF a file alone says little; a repository's name is no file.
    if not path.exists() or re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        return stored
    return path.stat().st_size


def _of_artifact(
    evaluation: Mapping[str, Any] | None, part: str, path: Path
) -> dict[str, Mapping[str, Any]]:
    """The entries about this artifact, by text."""
    entries = (evaluation or {}).get(part, [])
    name = path.resolve().name
    return {str(e.get("text")): e for e in entries if Path(str(e.get("artifact"))).name == name}


def _errors(model: Model, against: str | Path, threads: int) -> Events[dict[str, float | None]]:
    with open_model(against, vocabulary=False) as source:
        done = yield from take(verify(model, source, threads=threads), VerificationDone)
    for problem in done.problems:
        yield Note(f"{model.label}: {problem}", "warning")
    return {line.name: line.error.relative if line.error else None for line in done.lines}


def _outliers(source: Model, threads: int) -> Events[tuple[Outlier, ...]]:
    matrices = [each for each in source.tensors if len(each.shape) == 2]
    done = yield from take(
        measure_weights([_source(source, each) for each in matrices], threads), WeightStatsDone
    )
    found = [
        Outlier(name, each) for name, stats in done.stats.items() for each in stats.channels(2)
    ]
    return tuple(sorted(found, key=lambda each: -each.channel.ratio)[:_CHANNELS])


def _source(model: Model, tensor: OutputTensor) -> WeightSource:
    return WeightSource(
        tensor.name, tensor.shape, tensor.dtype, model.stored_bytes(tensor),
        lambda start, stop: model.read_rows(tensor, start, stop),
    )  # fmt: skip


def _common_name(names: Sequence[str]) -> str:
    """What names begin with in common, up to a hyphen."""
    shortest = min(names, key=len)
    length = next(
        (i for i, c in enumerate(shortest) if any(name[i] != c for name in names)), len(shortest)
    )
    common = shortest[:length].removesuffix(".gguf")
    return common.rpartition("-")[0] or common or names[0]


def texts_of(facts: ReportFacts) -> Iterator[tuple[str, list[ArtifactFacts]]]:
    """Each text, with the artifacts that were measured on it."""
    for text in facts.texts:
        yield text, [each for each in facts.artifacts if text in each.measured]
