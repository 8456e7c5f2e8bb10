"""transformers' code on a model's weights: a checkpoint's, or a GGUF's decoded by our kernels.

So the error of the weights is measured alone, without a runtime's rounding of activations.
Everything is float32. Weights stay in memory (the device's) when they fit into half of what is
free; otherwise windows go through the model in batches, layer by layer, and only one layer's
weights are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import rebuild_config
from quantcli.errors import MissingExtraError, SourceError, VocabularyError
from quantcli.evals.engines.base import Source, check_finite
from quantcli.evals.memory import available
from quantcli.evals.scores import Floats, row_blocks
from quantcli.evals.windows import Tokens, Window
from quantcli.formats import get_format, native
from quantcli.layerwise.windows import Tokenizer
from quantcli.model import Model
from quantcli.sources.hf import read_config
from quantcli.tensor_scales import multiply_scales

INSTALL = "pip install torch transformers"

_CHECKED = 32
"""Tokens that go through the whole decoder as well where no table knows its family."""

_CAPPED = "attn_logit_softcapping"
"""transformers caps attention logits in its eager attention alone."""


def open_engine(
    source: Source, context: int, threads: int, device: str | None = None
) -> TorchEngine:
    """The engine for ``source`` on a `quantcli.layerwise.devices`, None for the best.

    MissingExtraError where torch or transformers is missing, UsageError where the device is.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as missing:
        raise MissingExtraError(
            f"the torch engine needs {missing.name or 'torch'}", hint=INSTALL
        ) from None
    from quantcli.layerwise.devices import choose_device, torch_device
    from quantcli.layerwise.steady import use_threads

    device = choose_device(device)
    use_threads(threads, torch_device(device).type)
    words = open_tokenizer(source)
    return TorchEngine(
        multiply_scales(source.model), find_config(source), words, label=source.label,
        device=device,
    )  # fmt: skip


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
    from quantcli.evals.engines.llama_cpp import LlamaVocabulary, check_metadata

    check_metadata(model)
    try:
        return LlamaVocabulary(model.path)
    except MissingExtraError:
        raise VocabularyError(
            f"{source.label} is a GGUF, whose tokenizer runs in llama.cpp, which is not installed",
            hint="--config names a folder with its tokenizer.json; or pip install llama-cpp-python",
        ) from None


class TorchEngine:
    """A model in transformers' code on a ``device``.

    ``memory`` bytes of it may be taken (default: half of the free).
    """

    name = "torch"

    def __init__(
        self,
        model: Model,
        config: Mapping[str, Any],
        words: Any,
        *,
        label: str,
        memory: int | None = None,
        device: str = "cpu",
    ) -> None:
        from quantcli.layerwise.check_layers import check_layers
        from quantcli.layerwise.devices import device_errors, free_memory, torch_device
        from quantcli.layerwise.layerwise_model import LayerwiseModel

        self._label = label
        self._words = words
        self._errors = partial(device_errors, device)
        self._model = layers = LayerwiseModel(model, config, device=torch_device(device))
        if getattr(layers.module.config, _CAPPED, None):
            layers.module.set_attn_implementation("eager")
        self.vocabulary = layers.vocabulary
        if model.untabled is not None:
            check_layers(layers, range(min(_CHECKED, self.vocabulary)))
        self.begin: int | None = words.begin
        free = free_memory(layers.device)
        self._memory = (available() if free is None else free) // 2 if memory is None else memory
        self._held = ExitStack()
        everything = [
            name for i in range(len(layers.layers)) for name in layers.layer_parameters(i)
        ]
        everything += [*layers.outside_layers(), layers.head_name]
        self.resident = 4 * layers.element_count(everything) <= self._memory
        if self.resident:
            with self._errors():
                self._held.enter_context(layers.filled(everything))

    def tokenize(self, text: str, *, spelled: bool = False) -> Tokens:
        """Token ids of a text, the beginning token included where the vocabulary asks for it."""
        ids = np.asarray(self._words.encode(text, spelled=spelled), np.int32)
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
        for start in range(0, len(windows), step):
            with self._errors():
                yield from self._run(windows[start : start + step], start)

    def _batch(self, windows: Sequence[Window]) -> int:
        """Windows whose hidden states fit into a quarter of the memory."""
        each = 4 * self._model.hidden_size * max(len(window.tokens) for window in windows)
        return max(1, self._memory // 4 // each)

    def _run(self, windows: Sequence[Window], begin: int) -> Iterator[Floats]:
        from quantcli.layerwise.hidden_states import HiddenStateCache
        from quantcli.layerwise.walk import LayerWalk, run_silently

        # All windows are equally long, and nothing else enters.
        ids = np.stack([window.tokens for window in windows])
        if ids.size and int(ids.max()) >= self.vocabulary:
            raise SourceError(f"{self._label} has no token {int(ids.max())}")
        model = self._model
        states = HiddenStateCache((*ids.shape, model.hidden_size), model.dtype)
        walk = LayerWalk(model, ids, states, label=None)
        run_silently(walk.forward())
        with walk.head(weights=True):
            for number, window in enumerate(windows):
                rows = model.finish(walk.get(number))[:, window.first : window.last]
                for block in row_blocks(len(window.targets), self.vocabulary):
                    logits: Floats = model.logits(rows[:, block])[0].float().cpu().numpy()
                    check_finite(logits, self._label, begin + number, block.start)
                    yield logits

    def close(self) -> None:
        """Let the weights go."""
        self._held.close()
        if hasattr(self._words, "close"):
            self._words.close()
