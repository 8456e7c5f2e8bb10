"""transformers' own code for a model, without its weights, which are filled in layer by layer.

Every parameter starts on the meta device; `LayerwiseModel.filled` puts some parameters' values
there for the time of a ``with`` block. What a layer is called with besides the hidden states
(masks, rotary embeddings) comes from running the model once with its layers replaced by recorders,
and what follows the head (soft-capping) from running it with its decoder replaced, so no
architecture needs code of its own here. Rows of embeddings are looked up as a text needs them.

A decoder whose layers do not simply follow one another, each getting what the one before it gives,
is refused. Of a model that also sees images, the text model is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantcli.errors import ArchitectureError, QuantcliError
from quantcli.layerwise import call_recorder as recorders
from quantcli.layerwise.call_recorder import Answer, Call
from quantcli.layerwise.input_hooks import MatmulInput
from quantcli.layerwise.meta_model import build
from quantcli.layerwise.parameters import Parameters
from quantcli.layerwise.read_ahead import ReadAhead
from quantcli.layerwise.shared_gradients import SharedGradients
from quantcli.layerwise.steady import steady
from quantcli.layerwise.stored_parameters import StoredParameters
from quantcli.model import Model

_UNFIT = (TypeError, ValueError, IndexError, AttributeError, RuntimeError)
"""What a decoder raises when its layers answer in another form than it takes."""


class LayerwiseModel:
    """The modules of one model: `Embedder.embed`, then `run` for each layer, `finish`, `logits`.

    ``dtype`` is what products are computed in; norms' sums are float32 inside transformers.
    ``embedding_name`` and ``head_name`` are parameters, one and the same when they are tied;
    ``tables`` are those that tokens look up, the embedding among them, by name.
    """

    def __init__(
        self,
        model: Model,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.module = build(config, dtype)
        self.decoder = _decoder(self.module)
        self.layers = _blocks(self.decoder)
        named = dict(self.module.named_parameters()) | _stored_buffers(self.module)
        self._model = model
        self._shapes = {name: tuple(value.shape) for name, value in named.items()}
        self.parameters = (
            Parameters(model, config, self._shapes)
            if model.untabled is None
            else StoredParameters(model, self.module, self._shapes)
        )
        names = {id(parameter): name for name, parameter in named.items()}
        self._names = list(named)
        self.embedding_name = names[id(self.module.get_input_embeddings().weight)]
        self.head_name = names[id(self.module.get_output_embeddings().weight)]
        self._inside = [
            {names[id(value)] for value in _values(layer) if id(value) in names}
            for layer in self.layers
        ]
        self.tables = {
            names[id(owner.weight)]: owner.weight
            for owner in self.module.modules()
            if isinstance(owner, nn.Embedding) and len(owner.weight) > self.vocabulary // 2
        } | {self.embedding_name: self.module.get_input_embeddings().weight}
        self._answer: Answer | None = None
        self._filled: dict[str, torch.Tensor] = {}
        self._ahead = ReadAhead(lambda name: to_torch(self.parameters.read(name)), self.device)
        self._slots: dict[str, list[tuple[Any, str]]] = {}
        for owner in self.module.modules():
            for key, parameter in owner.named_parameters(recurse=False):
                self._slots.setdefault(names[id(parameter)], []).append((owner, key))
            for key, buffer in owner.named_buffers(recurse=False):
                if id(buffer) in names:
                    self._slots.setdefault(names[id(buffer)], []).append((owner, key))
                else:
                    setattr(owner, key, buffer.to(self.device))

    @property
    def hidden_size(self) -> int:
        """Length of a hidden state, all its streams one after another."""
        own = getattr(getattr(self.decoder, "config", None), "hidden_size", None)
        return self.streams * int(own or self.module.get_input_embeddings().weight.shape[1])

    @property
    def streams(self) -> int:
        """How many states of a token layers pass on, along a first axis if it is not one (AltUp).

        The embedding is the first, and what the others begin with is made of it.
        """
        return int(getattr(getattr(self.decoder, "config", None), "altup_num_inputs", 1))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids are smaller."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    def layer_parameters(self, index: int) -> list[str]:
        """Names of the parameters of layer ``index``, and of buffers that checkpoints hold."""
        return [name for name in self._names if name in self._inside[index]]

    def outside_layers(self) -> list[str]:
        """Names of the parameters in no layer, the head's and those that tokens look up apart."""
        apart = {self.embedding_name, self.head_name, *self.tables}.union(*self._inside)
        return [name for name in self._names if name not in apart]

    def element_count(self, names: Sequence[str]) -> int:
        """How many values these parameters have."""
        return sum(math.prod(self._shapes[name]) for name in names)

    def tensor_of(self, parameter: str) -> str | None:
        """GGUF's tensor that holds a parameter, the first one where there are several."""
        targets = self.parameters.targets(parameter, 0)
        return targets[0][0].name if targets else None

    def embedding_scale(self, window: NDArray[np.int32]) -> float:
        """What it multiplies embedding rows by (Gemma does), by least squares on a window."""
        with self.start() as start:
            hidden = start.embed(window.tolist())[0].float().cpu().numpy()
        rows = self.parameters.lookup(self.embedding_name, window.astype(np.int64))
        rows = rows.astype(np.float32)
        hidden = hidden[:, : hidden.shape[1] // self.streams]
        return float((hidden * rows).sum() / max(float((rows * rows).sum()), 1e-30))

    @cached_property
    def layer_starts(self) -> list[int]:
        """Stored bytes before each layer, and of all layers, to measure progress by."""
        stored = {tensor.name: tensor for tensor in self._model.tensors}
        starts = [0]
        for index in range(len(self.layers)):
            size = 0
            for name in self.layer_parameters(index):
                for use in self.parameters.uses(name):
                    tensor = stored.get(use.tensor.name)
                    if tensor is not None:
                        whole = self._model.stored_bytes(tensor) * use.piece.rows
                        size += whole // max(1, tensor.rows)
            starts.append(starts[-1] + size)
        return starts

    @contextmanager
    def filled(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Give these parameters their values for the time of the block; yields them by name.

        Those that are filled already stay as they are.
        """
        values: dict[str, torch.Tensor] = {}
        fresh = [name for name in names if name not in self._filled]
        empty: list[tuple[Any, str, Any]] = []
        try:
            for name in fresh:
                slots = [(module, key, getattr(module, key)) for module, key in self._slots[name]]
                buffered = not isinstance(slots[0][2], nn.Parameter)
                # A buffer's dtype is its class's choice, whatever products are computed in.
                dtype = slots[0][2].dtype if buffered else self.dtype
                value = self._ahead.take(name).to(self.device, non_blocking=True).to(dtype)
                self._filled[name] = value
                for module, key, held in slots:
                    empty.append((module, key, held))
                    filled = value if buffered else nn.Parameter(value, requires_grad=False)
                    setattr(module, key, filled)
            values |= {name: self._filled[name] for name in names}
            yield values
        finally:
            values.clear()
            for name in fresh:
                self._filled.pop(name, None)
            for module, key, parameter in empty:
                setattr(module, key, parameter)

    def read_ahead(self, names: Sequence[str]) -> None:
        """Begin to read parameters that `filled` will be asked for next."""
        self._ahead.begin(name for name in names if name not in self._filled)

    @contextmanager
    def start(self) -> Iterator[Embedder]:
        """Open the way from token ids to the first layer's input."""
        with self.filled(self.outside_layers()):
            yield Embedder(self)

    @torch.no_grad()
    @steady()
    def run(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Layer ``index`` (its parameters filled) on a window's hidden states (1, tokens, size)."""
        return self.output(index, hidden, call)

    def output(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The same, through which gradients may flow."""
        result = self.layers[index](self._part(hidden), *call[0], **call[1])
        return self.join(result[0] if isinstance(result, tuple) else result)

    def join(self, hidden: torch.Tensor) -> torch.Tensor:
        """Streams (streams, 1, tokens, size) as one state (1, tokens, streams * size)."""
        return hidden if hidden.dim() < 4 else hidden.permute(1, 2, 0, 3).flatten(2)

    def _part(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.streams == 1:
            return hidden
        return hidden.unflatten(2, (self.streams, -1)).permute(2, 0, 1, 3).contiguous()

    @steady()
    def run_backwards(
        self, index: int, hidden: torch.Tensor, gradient: torch.Tensor, call: Call,
        shared: SharedGradients,
    ) -> torch.Tensor:  # fmt: skip
        """The gradient by a layer's input (1, tokens, size), given the one by its output.

        Parameters that require gradients have theirs added up, as have ``shared`` states.
        """
        with torch.enable_grad():
            leaf = hidden.detach().clone().requires_grad_(True)
            shared.cut()
            result = self.output(index, leaf, call)
            roots, seeds = zip((result, gradient), *shared.roots(), strict=True)
            torch.autograd.backward(roots, seeds)
            shared.add()
        return gradient_of(leaf)

    def head_input(self, hidden: torch.Tensor) -> MatmulInput:
        """The head's product with a window's states after the last layer (1, tokens, size).

        `outside_layers` must be filled; the head's own weights are not needed.
        """
        rows = self.finish(hidden).flatten(0, 1)
        return MatmulInput(self.head_name, 0, rows, (self.head_name, 0))

    @torch.inference_mode()
    @steady()
    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's input: the last layer's output through the final norm.

        `outside_layers` must be filled.
        """
        return self._finish(hidden)

    def _finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of its last layer's output, whatever comes after it."""
        answer = self._answer or recorders.FORMS[0]
        answers = [answer] * (len(self.layers) - 1) + [lambda _: answer(self._part(hidden))]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with (
            recorders.replaced_layers(self.layers, answers),
            recorders.Lookup(self.tables, self._empty_rows),
        ):
            result: torch.Tensor = self.decoder(input_ids=ids, use_cache=False)[0]
        return result

    def _empty_rows(self, table: str, rows: NDArray[np.int64]) -> torch.Tensor:
        shape = (len(rows), self.tables[table].shape[1])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    @steady()
    def logits(self, finished: torch.Tensor) -> torch.Tensor:
        """Logits of rows that `finish` gave, (1, rows, vocabulary), with all the head does.

        The parameter ``head_name`` must be filled.
        """
        return self._logits(finished)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the last layer's output, through which gradients flow.

        `outside_layers` and the parameter ``head_name`` must be filled.
        """
        return self._logits(self._finish(hidden))

    def finish_traced(self, hidden: torch.Tensor) -> torch.Tensor:
        """`finish`, through which gradients flow."""
        return self._finish(hidden)

    def logits_traced(self, finished: torch.Tensor) -> torch.Tensor:
        """`logits`, through which gradients flow."""
        return self._logits(finished)

    def _logits(self, finished: torch.Tensor) -> torch.Tensor:
        with recorders.replaced_decoder(self.decoder, finished):
            ids = torch.zeros(finished.shape[:2], dtype=torch.int64, device=self.device)
            result: torch.Tensor = self.module(input_ids=ids, use_cache=False).logits
        return result


class Embedder:
    """Embeds windows of tokens, and records how the layers are called for their length."""

    def __init__(self, model: LayerwiseModel) -> None:
        self._model = model

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """The first layer's input, shape (1, tokens, hidden size)."""
        return self._record(ids)[0]

    def calls(self, ids: Sequence[int]) -> list[Call]:
        """What each layer is called with after the hidden states, for windows of this length.

        They may take part in a backward pass.
        """
        calls: list[Call] = recorders.copy_call(self._record(ids)[1], {})
        return calls

    @torch.inference_mode()
    @steady()
    def _record(self, ids: Sequence[int]) -> tuple[torch.Tensor, list[Call]]:
        model = self._model
        tokens = torch.tensor([list(ids)], device=model.device)
        failed: Exception | None = None
        for answer in [model._answer] if model._answer else recorders.FORMS:
            with (
                recorders.replaced_layers(model.layers, [answer] * len(model.layers)) as seen,
                recorders.Lookup(model.tables, self.rows),
            ):
                try:
                    model.decoder(input_ids=tokens, use_cache=False)
                except QuantcliError:
                    raise
                except _UNFIT as unfit:
                    failed = unfit
                    continue
            if recorders.find_gap(seen, 3 if model.streams == 1 else 4) is None:
                model._answer = answer
                return model.join(seen[0].hidden), [(one.args, one.kwargs) for one in seen]
        raise ArchitectureError(
            f"the layers of {type(model.decoder).__name__} cannot be run one by one, since they do "
            "not simply follow one another",
            hint="leave --method and --calibrate out",
        ) from failed

    def rows(self, table: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """Rows of a table that tokens are looked up in."""
        model = self._model
        return to_torch(model.parameters.lookup(table, rows)).to(model.device, model.dtype)


def gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient by a leaf that a backward pass reached."""
    if leaf.grad is None:
        raise RuntimeError("a backward pass gave no gradient")
    return leaf.grad


def to_torch(values: NDArray[Any]) -> torch.Tensor:
    """A tensor over the same memory; NumPy has no bfloat16 of its own, so that goes as bits."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _stored_buffers(module: Any) -> dict[str, torch.Tensor]:
    """What checkpoints hold besides parameters: a router's correction of its scores."""
    stored = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def _decoder(module: Any) -> Any:
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module.base_model
    if decoder is module:
        decoder = module.base_model
    # Llama 4's text model names another class's part as its base.
    return decoder if decoder is not module else getattr(module, "model", module)


def _values(layer: Any) -> Iterator[torch.Tensor]:
    """A layer's parameters and buffers."""
    yield from layer.parameters()
    yield from layer.buffers()


def _blocks(decoder: Any) -> Any:
    """The list of layers: the longest of those that lie in the decoder, or least deep in it."""
    lists = [(n.count("."), m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ArchitectureError(f"{type(decoder).__name__} has no list of layers")
    least = min(depth for depth, _ in lists)
    return max((found for depth, found in lists if depth == least), key=len)
