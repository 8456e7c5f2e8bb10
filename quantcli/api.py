"""What ``quantcli.quantize`` calls: one function for files and for model folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from quantcli.artifacts.gguf_file import GgufFile, add_metadata, take_encoded
from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.prepare import default_output, prepare_artifact
from quantcli.artifacts.write import Finished, default_threads, write_artifact
from quantcli.errors import UsageError
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe, value_of
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.recipe_defaults import resolve_recipe
from quantcli.plan.schemes import knows_importance
from quantcli.sources.imatrix import Importance, read_importance
from quantcli.types import Event

_Last = TypeVar("_Last", bound=Event)
_STATES = 4 << 30
"""Bytes of hidden states that stay in memory when nothing else is said."""


def quantize(
    source: str | Path,
    output: str | Path | None = None,
    *,
    calibrate: Sequence[str | Path] = (),
    chunks: int | None = None,
    resume: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    force: bool = False,
    **recipe: Any,
) -> Finished:
    """Quantize a model in one call; ``recipe`` takes the fields of `Recipe`, such as ``type``.

    ``to`` makes a model folder in place of a GGUF. ``output`` defaults to a name made of the
    model's and the recipe's in the current folder. A ``method`` runs the model on the texts
    ``calibrate`` (the built-in one, if there are none), on ``chunks`` windows of them at most;
    ``resume`` continues such a run. Raises a QuantcliError in one sentence for whatever is wrong,
    and then leaves nothing behind but what a later run can resume.
    """
    wanted = resolve_recipe(Recipe(), **recipe)
    check_recipe(wanted)
    if wanted.method is None:
        for name, given in {"calibrate": calibrate, "chunks": chunks, "resume": resume}.items():
            if given:
                raise UsageError(f"{name} belongs to a method", hint='add method="gptq"')
    else:
        from quantcli.layerwise.require_torch import require_torch
        from quantcli.run.recipe_options import check_methods

        require_torch()
        check_methods(wanted)
    importance = read_importance(Path(wanted.imatrix)) if wanted.imatrix else None
    with open_model(source, pre=wanted.pre, vocabulary=_reads_text(wanted)) as model:
        path = Path(output) if output is not None else default_output(model, wanted)
        call = _Call(wanted, path, resume, threads, max_memory, force)
        if wanted.method is not None:
            return call.round_by_methods(model, calibrate, chunks)
        return call.write(call.prepare(model, importance))


def _reads_text(recipe: Recipe) -> bool:
    return recipe.to == "gguf" or recipe.method is not None


@dataclass(frozen=True)
class _Call:
    recipe: Recipe
    path: Path
    resume: bool
    threads: int | None
    max_memory: int | None
    force: bool

    def prepare(self, model: Model, importance: Importance | None) -> GgufFile | ModelFolder:
        return prepare_artifact(
            model, self.recipe, self.path, importance=importance, force=self.force
        )

    def write(self, artifact: GgufFile | ModelFolder, encoded: Any = None) -> Finished:
        if encoded is not None and isinstance(artifact, GgufFile):
            artifact = take_encoded(artifact, encoded)
        elif encoded is not None and isinstance(artifact, ModelFolder):
            from quantcli.run.folder_codes import stored_codes

            artifact = replace(artifact, codes=stored_codes(artifact, encoded))
        events = write_artifact(artifact, threads=self.threads, max_memory=self.max_memory)
        return _last(events, Finished)

    def round_by_methods(
        self, model: Model, calibrate: Sequence[str | Path], chunks: int | None
    ) -> Finished:
        """Transform, then round with feedback or, where no method rounds, to the nearest."""
        from quantcli.layerwise.texts import read_texts
        from quantcli.run.choose_types import (
            Allocated,
            allocate_job,
            remove_survey,
            survey_folder,
        )
        from quantcli.run.find_transforms import Moved, find_transforms
        from quantcli.run.job import begin, prepare, rounded
        from quantcli.run.methods import ROUNDER, parse_methods
        from quantcli.run.recipe_options import read_options
        from quantcli.transforms.transformed_checkpoint import as_checkpoint

        chain = parse_methods(self.recipe.method or ROUNDER)
        if self.resume and not chain.rounds:
            raise UsageError(f"method {self.recipe.method} leaves nothing to resume")
        share = value_of(self.recipe, "random_share")
        texts = read_texts([str(text) for text in calibrate])
        planned = prepare(model, texts, chunks=chunks, random_share=share)
        job = self.prepare(model, self._known(planned.importance))
        memory, threads = self.max_memory or _STATES, self.threads or default_threads()
        gradients = None
        if isinstance(job, GgufFile) and (self.recipe.allocate or self.recipe.target_size):
            job = _last(
                allocate_job(
                    planned, job, self.path, read_options(self.recipe),
                    max_memory=memory, threads=threads,
                ),
                Allocated,
            ).job  # fmt: skip
            gradients = None if chain.transforms else survey_folder(self.path)
        call = replace(self, recipe=job.plan.recipe)
        if chain.transforms:
            found = find_transforms(
                planned, chain, job.plan, self.path, max_memory=memory, threads=threads
            )
            moved = _last(found, Moved)
            of = moved.model if self.recipe.to == "gguf" else as_checkpoint(moved.model)
            planned = planned.of(of)
            job = call.prepare(of, self._known(moved.importance or planned.importance))
        if not chain.rounds:
            return self.write(job)
        encoding = begin(
            planned, job.plan, self.path, read_options(self.recipe),
            max_memory=memory, threads=threads, resume=self.resume, force=self.force,
            gradients=gradients,
        )  # fmt: skip
        try:
            for _ in rounded(encoding):
                pass
            trained = encoding.store.trained
            if trained is not None and isinstance(job, GgufFile):
                job = add_metadata(job, trained.gain.keys)
            finished = self.write(job, encoding.store)
        except BaseException:
            encoding.store.close()
            if not encoding.checkpoint.done:
                encoding.checkpoint.remove()
                remove_survey(self.path)
            raise
        encoding.store.close()
        encoding.checkpoint.remove()
        remove_survey(self.path)
        return finished

    def _known(self, importance: Importance) -> Importance | None:
        return importance if self.recipe.to == "gguf" or knows_importance(self.recipe) else None


def _last(events: Iterable[Event], kind: type[_Last]) -> _Last:
    """The result of a run."""
    *_, found = events
    if not isinstance(found, kind):
        raise RuntimeError(f"a run ended without {kind.__name__}")
    return found
