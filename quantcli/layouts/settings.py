"""The quantization settings in a checkpoint's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.whole_files import read_whole

MLX = "mlx"
"""The method of folders that name none but say how MLX packed them."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where config.json may have them."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The quantization's settings as they stand in ``path`` under ``key``."""

    method: str
    values: Mapping[str, Any]
    path: Path
    key: str

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number; SourceError for anything else, and for none without a default."""
        return count(self.values, key, self.where, default, least=least)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; SourceError for anything else."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise SourceError(f"{self.where}: {key} is {value!r}; true or false belongs there")
        return value

    @property
    def where(self) -> str:
        """File and key, as messages begin."""
        return f"{self.path}: {self.key}"

    @property
    def may_be_plain(self) -> bool:
        """Whether they may be about activations or caches alone (compressed-tensors), be a file
        that was left beside weights that are no longer quantized, or name every module that stays
        in 16 bits (AutoRound, which leaves all out whose groups it cannot make)."""
        if self.key in _BESIDE or self._keeps_modules:
            return True
        if self.method == "modelopt":
            return self.is_of_caches
        if self.method != "compressed-tensors":
            return False
        return self.values.get("format") == "dense" or self.is_of_caches

    @property
    def _keeps_modules(self) -> bool:
        """Whether AutoRound's ``extra_config`` speaks of modules in 16 bits, and of no other."""
        extra = self.values.get("extra_config")
        if not isinstance(extra, Mapping) or not extra:
            return False
        return all(isinstance(own, Mapping) and own.get("bits") == 16 for own in extra.values())

    @property
    def is_of_caches(self) -> bool:
        """Whether they speak of key-value caches alone."""
        of_cache = self.values.get("kv_cache_scheme") or self.values.get("kv_cache_quant_algo")
        return bool(of_cache) and not (
            self.values.get("config_groups") or self.values.get("quant_algo")
        )

    def refuse(self, detail: str | None = None) -> SourceError:
        """The sentence on a method, or a kind of it, that is not read."""
        said = detail or self.values.get("quant_algo") or self.values.get("format")
        named = f"{self.method} ({said})" if said else self.method
        return SourceError(
            f"{self.path}: the checkpoint is already quantized with {named}, which is not read",
            hint="take the original weights in BF16, F16 or F32",
        )


def read_settings(config: Mapping[str, Any], path: Path) -> Settings | None:
    """The settings in config.json at ``path`` or in its text model's part; None without any."""
    text_config = config.get("text_config")
    for owner in (config, text_config if isinstance(text_config, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            values = owner.get(key)
            if values is None:
                continue
            if not isinstance(values, Mapping):
                raise SourceError(f"{path}: {key} is not an object")
            return Settings(_method(values), values, path, key)
    return None


_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ kept the settings before config.json took them."""


def read_beside(path: Path) -> Settings | None:
    """The settings in a file beside config.json at ``path``; None without any."""
    for name, method in _BESIDE.items():
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        try:
            values = json.loads(read_whole(beside))
        except OSError as error:
            raise SourceError(f"{beside}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{beside}: is not JSON: {error}") from error
        if not isinstance(values, Mapping):
            raise SourceError(f"{beside}: holds no object")
        return Settings(str(values.get("quant_method") or method), values, beside, name)
    return None


_AUTO_ROUND = {"auto_gptq": "gptq", "auto_awq": "awq", "auto_round": "gptq", "gptqmodel": "gptq"}
"""AutoRound's name of a layout that it writes, and the layout; the last two are of version 2."""


def _method(values: Mapping[str, Any]) -> str:
    method = values.get("quant_method")
    if method is None and {"bits", "group_size"} <= values.keys():
        return MLX
    if method in ("auto-round", "intel/auto-round"):
        packing = str(values.get("packing_format", "")).removeprefix("auto_round:")
        return _AUTO_ROUND.get(packing, str(method))
    return str(method or "unknown")


def count(
    values: Mapping[str, Any],
    key: str,
    where: str,
    default: int | None = None,
    *,
    least: int = 1,
) -> int:
    """The whole number ``values[key]``, at least ``least``; SourceError begins with ``where``."""
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SourceError(
            f"{where}: {key} is {value!r}; a whole number of at least {least} belongs there"
        )
    return value
