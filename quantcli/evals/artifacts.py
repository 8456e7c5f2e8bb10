"""A model under test: what it is, what it weighs, and the engine that will run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from quantcli.errors import SourceError, UsageError
from quantcli.evals.engines import ENGINES
from quantcli.evals.engines.base import Engine, Source
from quantcli.model import Model, open_model
from quantcli.registry import lacks_attributes
from quantcli.sources.address import file_size
from quantcli.sources.resolve import resolve

AUTO = "auto"


@dataclass(frozen=True)
class EvaluatedModel:
    """An opened model (headers only) and the name of its engine."""

    source: Source
    engine: str

    @property
    def label(self) -> str:
        """What the user called it."""
        return self.source.label

    @property
    def model(self) -> Model:
        """The model."""
        return self.source.model

    @property
    def checkpoint(self) -> Path | None:
        """The folder, where it is one."""
        return None if self.model.from_gguf else self.model.path

    @property
    def nbytes(self) -> int:
        """Bytes of the files that hold its weights."""
        return sum(map(file_size, {info.file for info in self.model.store.tensors.values()}))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of the model, over all its tensors."""
        kept = [tensor for tensor in self.model.tensors if tensor.values is None]
        stored = sum(self.model.stored_bytes(tensor) for tensor in kept)
        return 8 * stored / max(1, sum(tensor.elements for tensor in kept))

    def load(self, context: int, threads: int, device: str | None = None) -> Engine:
        """Read the weights, for windows of ``context`` tokens; ``device`` is torch's."""
        chosen = {"device": device} if device is not None and self.engine == "torch" else {}
        engine: Engine = ENGINES.get(self.engine)(self.source, context, threads, **chosen)
        lack = lacks_attributes("vocabulary", "begin", "tokenize", "run", "close")(engine)
        if lack is not None:
            raise UsageError(f"the engine {self.engine!r} {lack.removeprefix('it ')}")
        return engine


def open_artifact(
    target: str,
    *,
    engine: str = AUTO,
    folder: Path | None = None,
    tokenizer: Path | None = None,
    download: bool = False,
    on_progress: Callable[..., None] | None = None,
) -> EvaluatedModel:
    """Open a folder, repo id or GGUF; "auto" takes llama.cpp for a GGUF where it is installed.

    ``folder`` and ``tokenizer`` are `Source`'s; ``download`` is `open_model`'s.
    UsageError for an engine that does not exist.
    """
    if engine != AUTO:
        engine = ENGINES.canonical(engine) or ENGINES.get(engine)
    found = resolve(target, weights=download, on_progress=on_progress)
    if found.is_remote and found.kind == "gguf":
        # llama.cpp opens the file itself.
        found = resolve(target, on_progress=on_progress)
    model = open_model(target, table=False, found=found)
    if not model.tensors:
        model.store.close()
        raise SourceError(f"{target} has no tensors")
    model.require_next_token("evaluated by its predictions")
    if engine == AUTO:
        # Of a GGUF the smaller installation is asked for where neither is there.
        runs = find_spec("llama_cpp") or not find_spec("torch")
        engine = "llama.cpp" if model.from_gguf and runs else "torch"
    return EvaluatedModel(Source(model, target, folder, tokenizer), engine)


def check_folder(folder: Path | None) -> None:
    """UsageError when ``--config`` names no folder."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="--config names a checkpoint's folder")
