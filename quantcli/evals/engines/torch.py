"""transformers' code on a model's weights: a checkpoint's, or a GGUF's decoded by our kernels.

So the error of the weights is measured alone, without a runtime's rounding of activations.
Everything is float32. Weights stay in memory when they fit into half of what is free; otherwise
windows go through the model in batches, layer by layer, and only one layer's weights are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import rebuild_config
from quantcli.errors import MissingExtraError, SourceError, VocabularyError
from quantcli.evals.engines.base import Source, check_finite
from quantcli.evals.memory import available
from quantcli.evals.scores import Floats
from quantcli.evals.windows import Tokens, Window
from quantcli.formats import get_format, native
from quantcli.layerwise.windows import Tokenizer
from quantcli.model import Model
from quantcli.sources.hf import read_config

if TYPE_CHECKING:
    from quantcli.layerwise.layered_model import Call

INSTALL = "pip install 'quantcli[torch]'"

_CAPPED = "attn_logit_softcapping"
"""transformers caps attention logits in its eager attention alone."""


def open_engine(source: Source, context: int, threads: int) -> TorchEngine:
    """The engine for ``source``; MissingExtraError where torch or transformers is missing."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as missing:
        raise MissingExtraError(
            f"the torch engine needs {missing.name or 'torch'}", hint=INSTALL
        ) from None
    torch.set_num_threads(threads)
    words = open_tokenizer(source)
    return TorchEngine(source.model, find_config(source), words, label=source.label)


def find_config(source: Source) -> Mapping[str, Any]:
    """The model's config.json, out of the folder that was named or of what a GGUF says."""
    model = source.model
    if not model.from_gguf:
        return model.config
    if source.folder is not None:
        return read_config(source.folder)
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    return rebuild_config(model.arch, model.metadata, shapes, lambda name: _values(model, name))


def _values(model: Model, name: str) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    rows = model.read_rows(tensor, 0, tensor.rows)
    return native.decode(get_format(tensor.dtype), rows) if rows.dtype == np.uint8 else rows


class _Words:
    """A tokenizer from files, in an engine's words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = tokenizer.encode
        self.begin = tokenizer.bos


def open_tokenizer(source: Source) -> Any:
    """Something with ``encode`` and ``begin``; of a GGUF without a folder it is llama.cpp's."""
    model = source.model
    folder = source.folder or source.tokenizer
    if not model.from_gguf:
        return _Words(Tokenizer(model))
    if folder is not None:
        return _Words(Tokenizer(replace(model, path=folder)))
    from quantcli.evals.engines.llama_cpp import LlamaVocabulary

    try:
        return LlamaVocabulary(model.path)
    except MissingExtraError:
        raise VocabularyError(
            f"{source.label} is a GGUF, whose tokenizer runs in llama.cpp, which is not installed",
            hint="--config names a folder with its tokenizer.json; or pip install "
            "'quantcli[llama-cpp]'",
        ) from None


class TorchEngine:
    """A model in transformers' code; ``memory`` bytes may be taken (default: half of the free)."""

    name = "torch"

    def __init__(
        self,
        model: Model,
        config: Mapping[str, Any],
        words: Any,
        *,
        label: str,
        memory: int | None = None,
    ) -> None:
        from quantcli.layerwise.layered_model import Skeleton

        self._label = label
        self._words = words
        self._skeleton = skeleton = Skeleton(model, config)
        if getattr(skeleton.module.config, _CAPPED, None):
            skeleton.module.set_attn_implementation("eager")
        self.vocabulary = skeleton.vocabulary
        self.begin: int | None = words.begin
        self._memory = available() // 2 if memory is None else memory
        self._held = ExitStack()
        everything = [
            *skeleton.outside_layers(),
            *(name for i in range(len(skeleton.layers)) for name in skeleton.layer_parameters(i)),
            skeleton.head_name,
        ]
        sizes = dict(skeleton.module.named_parameters())
        self.resident = 4 * sum(sizes[name].numel() for name in everything) <= self._memory
        if self.resident:
            self._held.enter_context(skeleton.filled(everything))

    def tokenize(self, text: str) -> Tokens:
        """Token ids of a text, the beginning token included where the vocabulary asks for it."""
        ids = np.asarray(self._words.encode(text), np.int32)
        if len(ids) and int(ids.max()) >= self.vocabulary:
            raise VocabularyError(
                f"the tokenizer for {self._label} gives token {int(ids.max())}, but the model "
                f"has {self.vocabulary}",
                hint="the tokenizer belongs to another model",
            )
        return ids

    def run(self, windows: Sequence[Window]) -> Iterator[Floats]:
        """Each window's logits; with weights that do not fit, in batches of windows."""
        step = 1 if self.resident else self._batch(windows)
        number = 0
        for start in range(0, len(windows), step):
            for logits in self._run(windows[start : start + step]):
                check_finite(logits, self._label, number)
                yield logits
                number += 1

    def _batch(self, windows: Sequence[Window]) -> int:
        """Windows whose hidden states fit into a quarter of the memory."""
        each = 4 * self._skeleton.hidden_size * max(len(window.tokens) for window in windows)
        return max(1, self._memory // 4 // each)

    def _run(self, windows: Sequence[Window]) -> Iterator[Floats]:
        skeleton = self._skeleton
        calls: list[Call] = []
        with skeleton.start() as start:
            hidden = []
            for window in windows:
                ids = window.tokens.tolist()
                if ids and max(ids) >= self.vocabulary:
                    raise SourceError(f"{self._label} has no token {max(ids)}")
                hidden.append(start.embed(ids))
                # All windows are equally long, and nothing else enters.
                calls = calls or start.calls(ids)
        for index, call in enumerate(calls):
            with self._filled(skeleton.layer_parameters(index)):
                hidden = [skeleton.run(index, states, call) for states in hidden]
        with self._filled([*skeleton.outside_layers(), skeleton.head_name]):
            for window, states in zip(windows, hidden, strict=True):
                rows = skeleton.finish(states)[:, window.first : window.last]
                logits: Floats = skeleton.logits(rows)[0].float().numpy()
                yield logits

    def _filled(self, names: list[str]) -> Any:
        return ExitStack() if self.resident else self._skeleton.filled(names)

    def close(self) -> None:
        """Let the weights go."""
        self._held.close()
        if hasattr(self._words, "close"):
            self._words.close()
