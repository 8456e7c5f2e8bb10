"""What towers have in common: blocks of a vision transformer, patches, projectors.

Towers put their tables together from these; names on the left are llama.cpp's, on the right
transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quantcli.archs.config import Config, check_fixed, class_name, integer
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Part, Rule, Size
from quantcli.archs.towers.base import Wrapper
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32


def tensor(name: str, source: str, *shape: Size, optional: bool = False) -> Rule:
    """A rule for one tensor, of every layer where its names have ``{i}``."""
    return Rule(name, source, shape, optional=optional)


def block(prefix: str, source: str, attention: str = "self_attn", out: str = "out_proj") -> tuple[
    Rule, ...
]:  # fmt: skip
    """A pre-normed block with biases, as CLIP, SigLIP and Whisper have it.

    ``prefix`` is "v" or "a", and the names of the sizes start with it where it is "a".
    """
    hidden, ff = ("hidden", "ff") if prefix == "v" else ("a_hidden", "a_ff")
    at, of = f"{prefix}.blk.{{i}}", f"{source}.{{i}}"
    return biased(
        tensor(f"{at}.ln1.weight", f"{of}.layer_norm1.weight", hidden),
        tensor(f"{at}.ln2.weight", f"{of}.layer_norm2.weight", hidden),
        *(
            tensor(f"{at}.attn_{name}.weight", f"{of}.{attention}.{proj}.weight", hidden, hidden)
            for name, proj in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", out))
        ),
        tensor(f"{at}.ffn_up.weight", f"{of}.mlp.fc1.weight", ff, hidden),
        tensor(f"{at}.ffn_down.weight", f"{of}.mlp.fc2.weight", hidden, ff),
    )


def patches(source: str) -> Rule:
    """The convolution that makes patches of pixels."""
    return tensor("v.patch_embd.weight", source, "hidden", 3, "patch", "patch")


def patch_rows(source: str, *, channels_last: bool) -> Rule:
    """The same, stored as a matrix over a patch's pixels."""
    view: tuple[Size, ...] = ("hidden", "patch", "patch", 3)
    part = Part(view, (0, 3, 1, 2)) if channels_last else Part(("hidden", 3, "patch", "patch"))
    return replace(patches(source), stored=("hidden", "pixels"), parts=(part,))


def frames(source: str) -> tuple[Rule, ...]:
    """A convolution over pairs of frames, which llama.cpp takes as one for each frame."""
    stored: tuple[Size, ...] = ("hidden", 3, 2, "patch", "patch")
    return tuple(
        replace(
            patches(source),
            name=f"v.patch_embd.weight{suffix}",
            stored=stored,
            parts=(Part(stored, cut=((2, frame, frame + 1),)),),
        )
        for frame, suffix in enumerate(("", ".1"))
    )


def thirds(prefix: str, source: str) -> tuple[Rule, ...]:
    """q, k and v with biases, of ``source``, which holds them in this order."""
    matrices = (
        replace(
            tensor(f"{prefix}.attn_{name}.weight", f"{source}.weight", "hidden", "hidden"),
            stored=("qkv", "hidden"),
            parts=(Part((3, "hidden", "hidden"), cut=((0, index, index + 1),)),),
        )
        for index, name in enumerate("qkv")
    )
    biases = (
        replace(
            tensor(f"{prefix}.attn_{name}.bias", f"{source}.bias", "hidden"),
            stored=("qkv",),
            parts=(Part((3, "hidden"), cut=((0, index, index + 1),)),),
        )
        for index, name in enumerate("qkv")
    )
    return (*matrices, *biases)


def vision_dims(
    wrapper: Wrapper, config: Config, *, layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
) -> dict[str, int]:  # fmt: skip
    """Sizes of a vision tower; ``width`` is the text model's.

    Square images and patches only, which a list of two equal sides may give.
    """
    hidden, count = integer(config, "hidden_size"), integer(config, heads)
    if hidden % count:
        raise ArchitectureError(
            f"hidden_size {hidden} of the tower of {class_name(config)} is not a multiple of its "
            f"{count} heads"
        )
    image, patch = side(config, "image_size"), side(config, "patch_size")
    return {
        "layers": integer(config, layers),
        "hidden": hidden,
        "ff": integer(config, "intermediate_size"),
        "heads": count,
        "image": image,
        "patch": patch,
        "positions": (image // patch) ** 2,
        "pixels": 3 * patch * patch,
        "qkv": 3 * hidden,
        "width": integer({**wrapper.text, "architectures": config["architectures"]}, "hidden_size"),
    }


def side(config: Config, key: str) -> int:
    """The side of a square, given as a number or as a list of two equal ones."""
    value = config.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return integer({**config, key: value[0]}, key)
    return integer(config, key)


def integers(config: Config, key: str) -> list[int]:
    """A list of whole numbers from 0 on."""
    value = config.get(key)
    if not isinstance(value, list) or not all(_is_whole(entry) for entry in value):
        raise ArchitectureError(
            f"{key} of the tower of {class_name(config)} in config.json is {value!r}, expected a "
            "list of whole numbers"
        )
    return list(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_base(config: Config, base: float) -> None:
    """Refuse a rotation with another base than llama.cpp's constant."""
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, Mapping):
        raise ArchitectureError(
            f"rope_parameters of the tower of {class_name(config)} in config.json is not an object"
        )
    check_fixed({**config, **(rope or {})}, {"rope_theta": (base, int(base))})


def refuse_swapped(wrapper: Wrapper, dims: Dims) -> None:
    """Refuse an MLP as wide as the tower, which llama.cpp takes for an old file's swapped one."""
    if dims["ff"] == dims["hidden"]:
        raise ArchitectureError(
            f"the tower of {class_name(wrapper.config)} has intermediate_size {dims['ff']} equal "
            "to hidden_size, and llama.cpp would swap the two matrices of its MLP"
        )


def pixel_keys(wrapper: Wrapper) -> dict[str, MetaValue]:
    """How many pixels the processor leaves at least and at most, where llama.cpp asks for both."""
    return {
        "vision.image_min_pixels": u32(_pixels(wrapper, "min_pixels", "shortest_edge")),
        "vision.image_max_pixels": u32(_pixels(wrapper, "max_pixels", "longest_edge")),
    }


def _pixels(wrapper: Wrapper, name: str, edge: str) -> int:
    size = wrapper.processor.get("size")
    found = wrapper.processor.get(name, size.get(edge) if isinstance(size, dict) else None)
    if not isinstance(found, int):
        raise ArchitectureError(
            f"{name} of the image processor of {class_name(wrapper.config)} is {found!r}, "
            "expected a number of pixels",
            hint="fetch preprocessor_config.json from the model's repository",
        )
    return found
