"""Quantized checkpoints in every storage that is read: settings, parts and shapes changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from support.fuzz import micro
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import edit_json
from support.fuzz.kinds.checkpoints import spoil_weights
from support.fuzz.values import odd, odd_like, odd_text

Parts = dict[str, tuple[str, Any]]
"""A storage's tensors by the suffix that follows the module's name: dtype and values."""

_WRITTEN: dict[str, tuple[str, ...]] = {
    "gptq": ("--to", "gptq", "--group-size", "32"),
    "gptq-asymmetric": ("--to", "gptq", "--group-size", "32", "--asymmetric", "--bits", "8"),
    "gptq-v2": ("--to", "gptq-v2", "--group-size", "64", "--asymmetric"),
    "awq": ("--to", "awq", "--group-size", "32"),
    "mlx": ("--to", "mlx", "--group-size", "32"),
    "fp8": ("--to", "fp8"),
    "packed": ("--to", "compressed-tensors", "--group-size", "32"),
    "packed-asymmetric": ("--to", "compressed-tensors", "--group-size", "32", "--asymmetric"),
    "int8": ("--to", "compressed-tensors", "--activations", "int8"),
    "fp8-dynamic": ("--to", "compressed-tensors", "--scheme", "FP8_DYNAMIC"),
    "nvfp4": ("--to", "compressed-tensors", "--scheme", "NVFP4A16"),
    "mxfp4": ("--to", "compressed-tensors", "--scheme", "MXFP4A16"),
}


def _nf4(rows: int, columns: int, noise: Any) -> Parts:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, columns]}
    return {
        ".weight": ("U8", noise.integers(0, 256, (rows * columns // 2, 1), np.uint8)),
        ".weight.absmax": ("F32", np.ones(rows * columns // 64, np.float32)),
        ".weight.quant_map": ("F32", np.linspace(-1, 1, 16, dtype=np.float32)),
        ".weight.quant_state.bitsandbytes__nf4": (
            "U8",
            np.frombuffer(json.dumps(state).encode(), np.uint8),
        ),
    }


def _int8(rows: int, columns: int, noise: Any) -> Parts:
    return {
        ".weight": ("I8", noise.integers(-127, 128, (rows, columns), np.int8)),
        ".SCB": ("F32", np.ones(rows, np.float32)),
        ".weight_format": ("U8", np.zeros((), np.uint8)),
    }


def _modelopt(rows: int, columns: int, noise: Any) -> Parts:
    return {
        ".weight": ("U8", noise.integers(0, 256, (rows, columns // 2), np.uint8)),
        ".weight_scale": ("F8_E4M3", np.full((rows, columns // 16), 0x38, np.uint8)),
        ".weight_scale_2": ("F32", np.ones((), np.float32)),
    }


def _modelopt_fp8(rows: int, columns: int, noise: Any) -> Parts:
    return {
        ".weight": ("F8_E4M3", noise.integers(0, 0x70, (rows, columns), np.uint8)),
        ".weight_scale": ("F32", np.ones((), np.float32)),
        ".input_scale": ("F32", np.ones((), np.float32)),
    }


_READ: dict[str, tuple[Callable[[int, int, Any], Parts], dict[str, Any]]] = {
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "llm.int8": (_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "modelopt": (_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "modelopt-fp8": (_modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
}
_METHODS = (
    "gptq",
    "awq",
    "compressed-tensors",
    "bitsandbytes",
    "modelopt",
    "mxfp4",
    "fp8",
    "mlx",
    "quark",
    "aqlm",
    "hqq",
    "auto-round",
    "fbgemm_fp8",
    "eetq",
    "vptq",
    "quanto",
    "",
)
_KEYS = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic", "version",
         "zero_point", "config_groups", "ignore", "format", "sparsity_config", "transform_config",
         "load_in_4bit", "mode", "modules_to_not_convert", "weight_block_size", "quant_algo",
         "packing_format", "kv_cache_scheme", "exclude_modules", "activation_scheme")  # fmt: skip


def _read_only(name: str) -> dict[str, bytes]:
    """A checkpoint in a storage that quantcli only reads."""
    make, settings = _READ[name]
    noise = np.random.default_rng(11)
    header: dict[str, Any] = {}
    data = b""
    for full, values in micro.tensors().items():
        linear = full.endswith("_proj.weight")
        parts = make(*values.shape, noise) if linear else {".weight": ("F32", values)}
        for suffix, (dtype, content) in parts.items():
            raw = np.ascontiguousarray(content).tobytes()
            header[full.removesuffix(".weight") + suffix] = {
                "dtype": dtype, "shape": list(np.shape(content)),
                "data_offsets": [len(data), len(data) + len(raw)],
            }  # fmt: skip
            data += raw
    config = {**micro.config(), "quantization_config": settings}
    return {
        **micro.files(),
        "model.safetensors": micro.join_safetensors(json.dumps(header).encode(), data),
        "config.json": json.dumps(config).encode(),
    }


def _warm(folder: Path) -> Any:
    bases = {name: micro.packed(folder, *args, name=name) for name, args in _WRITTEN.items()}
    return bases | {name: _read_only(name) for name in _READ}


def _settings(chance: Random, config: dict[str, Any]) -> str:
    """Change what config.json says of the quantization."""
    key = "quantization_config" if "quantization_config" in config else "quantization"
    said = config.setdefault(key, {})
    what = chance.choice(("method", "key", "like", "like", "group", "group", "pattern", "ignore"))
    if what == "method":
        said["quant_method"] = chance.choice(_METHODS)
        return f"quant_method {said['quant_method']!r}"
    if what == "key":
        name = chance.choice(_KEYS)
        said[name] = odd(chance)
        return f"{name} {str(said[name])[:40]!r}"
    groups = said.get("config_groups")
    if what in ("group", "pattern") and isinstance(groups, dict) and groups:
        group = chance.choice(list(groups.values()))
        if what == "pattern":
            group["targets"] = chance.choice(
                (
                    ["re:((a+)+)+$"],
                    ["re:(([a-z_.0-9]+)+)+!"],
                    ["re:("],
                    [5],
                    "Linear",
                    [odd_text(chance)],
                    [],
                    ["re:.*"] * 5000,
                    ["re:" + "(a?){40}" * 5 + "a{40}"],
                    {"a": 1},
                    ["Linear", None],
                )
            )
            return f"targets {str(group['targets'])[:40]}"
        name = chance.choice(list(group))
        inner = group[name]
        if isinstance(inner, dict) and inner:
            deeper = chance.choice(list(inner))
            inner[deeper] = odd_like(chance, inner[deeper])
            return f"{name}.{deeper} {str(inner[deeper])[:40]!r}"
        group[name] = odd_like(chance, inner)
        return f"{name} {str(group[name])[:40]!r}"
    if what == "ignore":
        said["ignore"] = chance.choice(
            (
                ["re:((a+)+)+$"],
                ["re:.*"],
                "lm_head",
                [None],
                [5],
                {},
                ["lm_head"] * 9000,
                [odd_text(chance)],
            )
        )
        return f"ignore {str(said['ignore'])[:40]}"
    name = chance.choice(list(said) or ["bits"])
    said[name] = odd_like(chance, said.get(name))
    return f"{name} {str(said[name])[:40]!r}"


def _parts(chance: Random, raw: bytes) -> tuple[bytes, str]:
    """Take away, reshape, retype or fill one part of a packed weight."""
    header, data = micro.split_safetensors(raw)
    header = deepcopy(header)
    names = [name for name in header if name != "__metadata__" and "layers" in name]
    name = chance.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    what = chance.choice(("drop", "shape", "dtype", "fill", "fill", "rename", "beside", "empty"))
    if what == "drop":
        # Rewritten whole, so that no hole is what is refused.
        kept = {
            n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for n, e in header.items()
            if n not in (name, "__metadata__")
        }
        return _joined(kept), f"drop {name}"
    if what == "fill":
        filling = chance.choice((b"\xff", b"\x7f", b"\x80", b"\0", b"\x7c"))
        data = data[:begin] + filling * (end - begin) + data[end:]
    elif what == "shape":
        entry["shape"] = chance.choice(
            (
                entry["shape"][::-1],
                [*entry["shape"], 1],
                [1, *entry["shape"]],
                [int(np.prod(entry["shape"]))],
            )
        )
    elif what == "dtype":
        same = {
            1: ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
            2: ("F16", "BF16", "I16", "U16"),
            4: ("F32", "I32", "U32"),
            8: ("F64", "I64", "U64"),
        }
        width = (end - begin) // max(1, int(np.prod(entry["shape"])))
        entry["dtype"] = chance.choice(same.get(width, ("F32",)))
    elif what == "rename":
        header[name.replace("layers.0", "layers.1")] = header.pop(name)
    elif what == "beside":
        header[name.rpartition(".")[0] + ".weight"] = header.pop(name)
    else:
        header[name] = {"dtype": entry["dtype"], "shape": [0], "data_offsets": [0, 0]}
    return micro.join_safetensors(json.dumps(header).encode(), data), f"{what} {name}"


def _joined(parts: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, raw) in parts.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return micro.join_safetensors(json.dumps(header).encode(), data)


def _make(chance: Random, folder: Path, bases: Any) -> Case:
    name = chance.choice(sorted(bases))
    parts = dict(bases[name])
    what = chance.choice(
        ("settings", "settings", "parts", "parts", "weights", "beside", "json", "floats")
    )
    config = json.loads(parts["config.json"])
    if what == "settings":
        what = _settings(chance, config)
        parts["config.json"] = _dump(config)
    elif what == "parts":
        parts["model.safetensors"], what = _parts(chance, parts["model.safetensors"])
    elif what == "weights":
        parts["model.safetensors"], what = spoil_weights(chance, parts["model.safetensors"])
    elif what == "json":
        key = "quantization_config" if "quantization_config" in config else "quantization"
        raw, what = edit_json(chance, config.get(key, {}))
        config[key] = "HERE"
        parts["config.json"] = json.dumps(config).encode().replace(b'"HERE"', raw)
    elif what == "floats":
        # The settings of a quantized model beside weights that are none.
        parts["model.safetensors"] = micro.files()["model.safetensors"]
    else:
        beside = chance.choice(
            ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
        )
        said = config.pop("quantization_config", {"bits": 4, "group_size": 32})
        parts["config.json"] = json.dumps(config).encode()
        parts[beside], done = edit_json(chance, said)
        what = f"{beside} {done}"
    micro.write(folder / "m", parts)
    one = ("--threads", "1")
    commands = chance.choice(
        (
            (command("inspect", "../in/m"),),
            (command("inspect", "../in/m", "--tensors", "--json"),),
            (command("inspect", "../in/m", "--stats", *one),),
            (
                command("export", "../in/m", "--to", "gguf", "-o", "m.gguf", *one),
                command("export", "m.gguf", "--verify", *one, sound=True),
            ),
            (command("export", "../in/m", "--to", "gguf", "--dry-run"),),
            (command("export", "../in/m", "--verify", *one),),
            (
                command(
                    "quantize",
                    "../in/m",
                    "--type",
                    "Q4_0",
                    "--allow-requantize",
                    "-o",
                    "m.gguf",
                    *one,
                ),
                command("inspect", "m.gguf", sound=True),
            ),
            (
                command(
                    "quantize",
                    "../in/m",
                    "--to",
                    "mlx",
                    "--group-size",
                    "32",
                    "--allow-requantize",
                    "-o",
                    "f",
                    *one,
                ),
            ),
            (command("quantize", "../in/m", "--dry-run", "--allow-requantize"),),
            (command("export", "../in/m", "--to", "card", "-o", "c.md"),),
        )
    )
    return Case(f"{name}: {what}", commands)


def _dump(config: dict[str, Any]) -> bytes:
    from support.fuzz.json_edits import dump

    return dump(config).encode("utf-8", "surrogatepass")


KINDS = (Kind("packed", _warm, _make, trials=300),)
