"""compressed-tensors' settings: ``config_groups`` say which module was quantized how.

What is written is one group for all linear layers. In other folders a group names its modules by
their full names, by regular expressions (``re:``) or by classes; the most specific wins. Classes
cannot be told from a checkpoint's names, so "Embedding" means the token embedding and any other
class everything else. What changes the meaning of the weights beyond that (sparsity, rotations
applied at run time) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.errors import SourceError
from quantcli.formats.float_grid import BLOCK, FloatGrid
from quantcli.formats.integer import IntegerGrid
from quantcli.layouts.base import CodeGrid, FolderFacts, FolderPart
from quantcli.layouts.fp8 import block_size
from quantcli.layouts.patterns import fit_patterns
from quantcli.layouts.settings import Settings, count
from quantcli.types import Matrix

METHOD = "compressed-tensors"

_FORMATS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_SCALE_DTYPES = {"E4M3": "torch.float8_e4m3fn", "E8M0": "torch.uint8"}
_LOADED_AS = {"mlp_AR": ("projector",)}
"""What transformers calls a part beside the language model (PaddleOCR-VL's projector) in memory."""
_REGEX = "re:"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embeddings)$")


def scale_shape(matrix: Matrix, grid: CodeGrid) -> tuple[int, ...]:
    """Of ``weight_scale``."""
    if grid.strategy == "tensor":
        return (1,)
    rows = -(-matrix.rows // BLOCK) if grid.strategy == "block" else matrix.rows
    return rows, grid.groups(matrix.columns)


def integer_weights(grid: IntegerGrid) -> dict[str, Any]:
    """What a group says of integer weights."""
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": grid.strategy,
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
    }


def float_weights(grid: FloatGrid) -> dict[str, Any]:
    """What a group says of weights that are small floats."""
    strategy = "tensor_group" if grid.scales == "E4M3" else grid.strategy
    found: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": grid.group_size,
        "dynamic": False,
    }
    if grid.strategy == "block":
        found["block_structure"] = [BLOCK, BLOCK]
    if grid.scales != "float":
        found["scale_dtype"] = found["zp_dtype"] = _SCALE_DTYPES[grid.scales]
    return found


def describe_config(subject: FolderFacts) -> dict[str, Any]:
    """The ``quantization_config`` of a folder: a group for each scheme.

    The one scheme of a folder is for all linear layers; of several, each names its modules.
    """
    forms = [part.packing.form for part in subject.parts]
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(forms) == 1 else list(part.modules),
            "weights": _weights(part),
            "input_activations": part.inputs,
            "output_activations": None,
            "format": part.packing.form,
        }
        for index, part in enumerate(subject.parts)
    }
    return {
        "quantization_config": {
            "quant_method": METHOD,
            "format": _format(forms),
            "quantization_status": "compressed" if forms else "frozen",
            "config_groups": groups,
            "ignore": _ignored(subject) if forms else [],
            "kv_cache_scheme": subject.cache,
        }
    }


def _format(forms: Sequence[str]) -> str:
    if not forms:
        return "dense"
    return forms[0] if len(set(forms)) == 1 else "mixed-precision"


def _weights(part: FolderPart) -> dict[str, Any]:
    if part.packing.weights is None:
        raise ValueError("the packing says nothing of its weights")
    return part.packing.weights(part.grid)


def _ignored(subject: FolderFacts) -> list[str]:
    """The kept modules; a tower beside the language model by an expression for all of it.

    Runtimes put a tower below a prefix that stored names of older checkpoints lack.
    """
    inside = {_root(module) for module in subject.quantized}
    found: dict[str, None] = {}
    for module in subject.kept:
        root = _root(module)
        apart = "." in module.removeprefix("model.") and root not in inside
        names = (root, *_LOADED_AS.get(root, ())) if apart else ()
        found |= {rf"{_REGEX}(.*\.)?{re.escape(name)}\..*": None for name in names}
        if not apart:
            found[module] = None
    return list(found)


def _root(module: str) -> str:
    return module.removeprefix("model.").partition(".")[0]


@dataclass(frozen=True, slots=True)
class StoredScheme:
    """How the weights of one group are stored; ``group`` is 0 where rows have one scale."""

    targets: tuple[str, ...]
    kind: str
    bits: int
    symmetric: bool
    group: int
    block: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class StoredSchemes:
    """All groups, and the modules that none of them means.

    ``fitted`` are the modules that each expression means.
    """

    groups: tuple[StoredScheme, ...]
    ignored: tuple[str, ...]
    where: str
    fitted: Mapping[str, frozenset[str]]

    def find(self, module: str, file: object) -> StoredScheme:
        """The scheme of a quantized module; SourceError when no group means it."""
        if any(module == entry or self._fits_regex(module, entry) for entry in self.ignored):
            raise SourceError(
                f"{file}: {module} holds codes, but {self.where} lists it under 'ignore'"
            )
        for fits in (str.__eq__, self._fits_regex, _fits_class):
            for scheme in self.groups:
                if any(fits(module, target) for target in scheme.targets):
                    return scheme
        raise SourceError(f"{file}: {module} holds codes, but no group of {self.where} targets it")

    def _fits_regex(self, module: str, target: str) -> bool:
        return target.startswith(_REGEX) and module in self.fitted[target.removeprefix(_REGEX)]


def read_schemes(settings: Settings, modules: Sequence[str]) -> StoredSchemes:
    """The groups of a ``quantization_config``; SourceError for what is not understood.

    ``modules`` are those that will be looked for.
    """
    values, where = settings.values, f"{settings.where}.config_groups"
    _refuse_more(settings)
    groups = values.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise SourceError(f"{where} is not an object")
    schemes = tuple(
        _read_scheme(name, group, settings)
        for name, group in groups.items()
        if not isinstance(group, Mapping) or group.get("weights") is not None
    )
    seen: set[str] = set()
    for scheme in schemes:
        for target in scheme.targets:
            if target in seen:
                raise SourceError(f"{where}: two groups target {target!r}")
            seen.add(target)
    ignored = _strings(values, "ignore", settings.where)
    patterns = [
        entry.removeprefix(_REGEX) for entry in (*seen, *ignored) if entry.startswith(_REGEX)
    ]
    fitted = fit_patterns(patterns, modules, settings.where)
    return StoredSchemes(schemes, ignored, settings.where, fitted)


def _refuse_more(settings: Settings) -> None:
    values = settings.values
    sparsity = values.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if kind not in (None, "dense"):
        raise settings.refuse(f"sparsity {kind}")
    transforms = values.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise settings.refuse("transforms at run time")


def _read_scheme(name: str, group: Any, settings: Settings) -> StoredScheme:
    where = f"{settings.where}.config_groups.{name}"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise SourceError(f"{where} does not say how weights are stored")
    layout = group.get("format") or settings.values.get("format")
    if layout is not None and layout not in _FORMATS:
        raise settings.refuse(str(layout))
    kind, bits = str(weights.get("type", "int")), count(weights, "num_bits", where, 8)
    if (kind, bits) not in (("float", 4), ("float", 8)) and not (kind == "int" and bits <= 8):
        raise settings.refuse(f"{kind} of {bits} bits")
    size = count(weights, "group_size", where, -1, least=-1)
    strategy = weights.get("strategy")
    if strategy is not None and strategy not in _STRATEGIES:
        raise settings.refuse(f"strategy {strategy}")
    if strategy in ("group", "tensor_group") and size <= 0:
        raise SourceError(f"{where}: strategy {strategy} has group_size {size}")
    return StoredScheme(
        targets=_strings(group, "targets", where) or ("Linear",),
        kind=kind,
        bits=bits,
        symmetric=weights.get("symmetric", True) is not False,
        group=max(size, 0),
        block=block_size(weights.get("block_structure"), settings),
    )


def _strings(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = values.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise SourceError(f"{where}: {key} is not a list of names")
    return tuple(found)


def _fits_class(module: str, target: str) -> bool:
    if not target[:1].isupper():
        return False
    return (target == "Embedding") == bool(_EMBEDDING.search(module))
