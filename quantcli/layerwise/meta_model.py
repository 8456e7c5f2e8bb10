"""transformers' module for a configuration, its parameters without memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from quantcli.errors import ArchitectureError

_APART = ("torch_dtype", "dtype", "quantization_config", "transformers_version")
"""Keys of config.json that say how weights were stored, not what they compute."""


def build(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The causal language model of config.json's contents, in evaluation mode.

    Raises ArchitectureError when transformers knows no such model or refuses the configuration.
    """
    fields = {key: _infinite(value) for key, value in config.items() if key not in _APART}
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise ArchitectureError("config.json names no model_type")
    try:
        whole = _settings(kind, fields)
        settings, auto = whole.get_text_config(decoder=True), AutoModelForCausalLM
        # The mappings of transformers' classes have no public way to ask them.
        if type(settings) not in auto._model_mapping:
            settings, auto = whole, AutoModelForImageTextToText
        with _parameters_on_meta(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            # Experts as a loop of plain products: they are seen one by one.
            module = auto.from_config(settings, dtype=dtype, experts_implementation="eager")
    except MemoryError:
        raise
    except Exception as refused:  # a setting of another kind may fail anywhere in transformers
        # Of an unknown kind transformers lists all that it knows.
        reason, _, _ = " ".join(str(refused).split()).partition(". Should contain one of")
        own_code = "auto_map" in config and "its own code, beside the weights, is not run"
        raise ArchitectureError(
            f"transformers cannot build this {kind} model: {reason}",
            hint=own_code or "another version of transformers may know it",
        ) from refused
    if auto is AutoModelForImageTextToText:
        _drop_towers(module)
    return module.eval()


def _infinite(value: Any) -> Any:
    """A value in which infinities, that JSON has not, are numbers; transformers writes objects."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _infinite(inner) for key, inner in value.items()}
    return [_infinite(item) for item in value] if isinstance(value, list) else value


def _settings(kind: str, fields: Mapping[str, Any]) -> Any:
    """The configuration of a known ``kind``, or else of the class that "architectures" names.

    Models that come with code of their own may call their kind otherwise (Kimi K2 is DeepSeek V3).
    """
    names = fields.get("architectures")
    named = getattr(transformers, str(names[0]), None) if names else None
    if kind not in CONFIG_MAPPING and named is not None:
        return named.config_class(**fields)
    return AutoConfig.for_model(kind, **fields)


def _drop_towers(module: Any) -> None:
    """Take out what stands beside the decoder of an image-text model and is not its head."""
    decoder = module.get_decoder()
    if decoder is module.model:
        return
    for name, part in list(module.model.named_children()):
        if part is not decoder:
            setattr(module.model, name, nn.Identity())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made in the block take no memory; buffers are real, since they are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: Any, name: str, value: Any) -> None:
        # A tied parameter is registered twice and must stay one object.
        if value is not None and not value.is_meta:
            value = nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
