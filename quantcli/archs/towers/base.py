"""What a tower is: the encoder of images or sounds beside a text model, llama.cpp's mmproj file.

A tower's file holds its tables, as a text family's does; what differs is where they read from.
Sizes stand in sections of the wrapper's config.json, the pixels' mean and deviation in the settings
of its processor, and of the checkpoint only the tower's own tensors count: the text model is
another output's.

Names of tensors and key-values: llama.cpp's tools/mtmd/clip-impl.h.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli.archs.assemble import assemble, rename
from quantcli.archs.config import Config, class_name, text_part
from quantcli.archs.rules import Dims, Rule, Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, OutputTensor, TensorInfo, array, boolean, f32, text, u32

CLIP = "clip"
"""GGUF's general.architecture of every tower."""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """What the files of a checkpoint say of the towers beside its text model."""

    config: Config
    """config.json as it stands."""
    processor: Mapping[str, Any]
    """The settings of its processor, an image processor's among them."""
    find_token: Callable[[str], int | None]
    """The id of an added token of its tokenizer."""

    def section(self, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """A tower's part of config.json, with transformers' ``defaults`` below what it gives."""
        found = self.config.get(name)
        if not isinstance(found, Mapping):
            raise ArchitectureError(
                f"config.json of {class_name(self.config)} has no {name}, which tells its tower"
            )
        given = {key: value for key, value in found.items() if value is not None}
        return {**defaults, **given, "architectures": [class_name(self.config)]}

    @property
    def text(self) -> dict[str, Any]:
        """The text model's part of config.json, or all of it where there is none."""
        return {**self.config, **text_part(self.config)}

    def channels(self, key: str) -> list[float]:
        """Three numbers of the image processor: image_mean or image_std.

        Raises ArchitectureError when they are missing.
        """
        values = self.processor.get(key)
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(isinstance(value, int | float) for value in values)
        ):
            raise ArchitectureError(
                f"{key} of the image processor of {class_name(self.config)} is {values!r}, "
                "expected three numbers",
                hint="fetch preprocessor_config.json from the model's repository; pixels are "
                "normalised by it",
            )
        return [float(value) for value in values]

    def token(self, content: str) -> int:
        """The id of an added token; ArchitectureError when the tokenizer has none."""
        found = self.find_token(content)
        if found is None:
            raise ArchitectureError(
                f"the tokenizer of {class_name(self.config)} has no token {content}, whose "
                "embedding belongs into the tower's file"
            )
        return found


def _no_values(wrapper: Wrapper, dims: Dims) -> Values:
    return {}


def _no_check(wrapper: Wrapper, dims: Dims) -> None:
    return None


def _no_notes(wrapper: Wrapper) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Tower:
    """A family of towers that llama.cpp runs under one projector type, or one for each modality."""

    own: str
    """Pattern at the start of its tensors' names, in the rules' spelling."""
    read_dims: Callable[[Wrapper], dict[str, int]]
    """Named sizes; "layers" are those of the rules that name none."""
    read_rules: Callable[[Wrapper], tuple[Rule, ...]]
    to_keys: Callable[[Wrapper, Dims], dict[str, MetaValue]]
    """Key-values without the prefix "clip."."""
    read_values: Callable[[Wrapper, Dims], Values] = _no_values
    """Float32 tensors computed from the configuration alone."""
    check: Callable[[Wrapper, Dims], None] = _no_check
    """Refuses what llama.cpp would compute differently."""
    read_notes: Callable[[Wrapper], tuple[str, ...]] = _no_notes
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements that bring other spellings of stored names to the rules'."""
    ignored: tuple[str, ...] = ()
    """Patterns (full match) of its stored tensors that are rightly left out."""
    extra: tuple[str, ...] = field(default=())
    """Names, in the rules' spelling, of the text model's tensors that it takes something of."""

    def tensors(self, wrapper: Wrapper, stored: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """Every tensor of the mmproj file.

        Raises ArchitectureError for a stored tensor of the tower that is unknown, missing or
        misshapen.
        """
        dims = self.dims(wrapper)
        named = rename(self.renames, stored)
        kept = {
            name: info
            for name, info in named.items()
            if re.match(self.own, name) or name in self.extra
        }
        return assemble(
            class_name(wrapper.config),
            self.read_rules(wrapper),
            lambda layer: dims,
            self.read_values(wrapper, dims),
            kept,
            keyed=(),
            renames=(),
            ignored=self.ignored,
        )

    def metadata(self, wrapper: Wrapper) -> dict[str, MetaValue]:
        """Every ``clip.*`` key-value; ArchitectureError for a missing or wrong setting."""
        keys = self.to_keys(wrapper, self.dims(wrapper))
        return {f"{CLIP}.{key}": value for key, value in keys.items()}

    def dims(self, wrapper: Wrapper) -> dict[str, int]:
        """The named sizes, once `check` has found nothing wrong."""
        dims = self.read_dims(wrapper)
        self.check(wrapper, dims)
        return dims


def vision_keys(
    wrapper: Wrapper, dims: Dims, projector: str, epsilon: float
) -> dict[str, MetaValue]:
    """The key-values of every vision tower; ``dims`` name its sizes as the parts of a tower do."""
    return {
        "projector_type": text(projector),
        "has_vision_encoder": boolean(True),
        "vision.projection_dim": u32(dims["width"]),
        "vision.image_size": u32(dims["image"]),
        "vision.patch_size": u32(dims["patch"]),
        "vision.embedding_length": u32(dims["hidden"]),
        "vision.feed_forward_length": u32(dims["ff"]),
        "vision.block_count": u32(dims["layers"]),
        "vision.attention.head_count": u32(dims["heads"]),
        "vision.attention.layer_norm_epsilon": f32(epsilon),
        "vision.image_mean": array("f32", wrapper.channels("image_mean")),
        "vision.image_std": array("f32", wrapper.channels("image_std")),
    }


def activation_keys(config: Config, key: str = "hidden_act") -> dict[str, MetaValue]:
    """Which of its activations llama.cpp takes: GELU, SiLU, or without a key-value quick GELU."""
    name = config.get(key)
    if name in ("gelu", "gelu_pytorch_tanh", "gelu_new"):
        return {"use_gelu": boolean(True)}
    if name in ("silu", "swish"):
        return {"use_silu": boolean(True)}
    if name == "quick_gelu":
        return {}
    raise ArchitectureError(
        f"{key} of the tower of {class_name(config)} is {name!r}, but llama.cpp's towers compute "
        "gelu, silu or quick_gelu"
    )
