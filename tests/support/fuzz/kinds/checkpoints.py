"""Checkpoints: weights, index, settings, and what stands under the files' names."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind
from support.fuzz.json_edits import dump, edit_json
from support.fuzz.values import odd, odd_text

DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4",
          "F8_E8M0", "C64", "f32", "")  # fmt: skip


def _write(folder: Path, parts: dict[str, bytes]) -> Path:
    return micro.write(folder / "m", parts)


def _warm(_: Path) -> Any:
    return micro.files(), micro.sharded()


def edit_header(chance: Random, header: dict[str, Any], size: int) -> tuple[bytes, str]:
    """A safetensors header with one cunning change, as bytes."""
    header = deepcopy(header)
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    entry = header[name]
    what = chance.choice((
        "overlap", "gap", "shape", "dtype", "swap", "huge", "negative", "name", "metadata", "empty",
        "tree", "tree", "tree", "scalar", "axes", "many",
    ))  # fmt: skip
    if what == "overlap":
        entry["data_offsets"] = list(header[chance.choice(names)]["data_offsets"])
    elif what == "gap":
        begin, end = entry["data_offsets"]
        shift = chance.choice((4, -4, 1, 64, size))
        entry["data_offsets"] = [begin + shift, end + shift]
    elif what == "shape":
        entry["shape"] = chance.choice((
            entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][:-1],
            [max(1, n // 2) for n in entry["shape"]], [1, *entry["shape"]],
        ))  # fmt: skip
    elif what == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif what == "swap":
        other = chance.choice(names)
        header[name], header[other] = header[other], header[name]
    elif what == "huge":
        entry["shape"] = chance.choice(
            ([2**63, 2], [2**32, 2**32], [2**31, 2**33], [2**62], [10**30], [0, 2**63], [2**40, 0])
        )
        if chance.random() < 0.5:
            entry["data_offsets"] = [0, chance.choice((2**63, 2**40, 0, size, 10**30))]
    elif what == "negative":
        entry[chance.choice(("shape", "data_offsets"))] = chance.choice(
            ([-1, 4], [4, -4], [-0.0, 1])
        )
    elif what == "name":
        header[odd_text(chance)] = header.pop(name)
    elif what == "metadata":
        header["__metadata__"] = chance.choice(
            (odd(chance), {"format": odd(chance)}, {"a": "b" * 10**5})
        )
    elif what == "empty":
        header = chance.choice(({}, {"__metadata__": {"format": "pt"}}))
    elif what == "scalar":
        header[name] = odd(chance)
    elif what == "axes":
        entry["shape"] = [1] * chance.choice((9, 64, 65, 3000)) + entry["shape"]
    elif what == "many":
        for number in range(chance.choice((100, 3000))):
            header[f"model.layers.{number}.x.weight"] = {
                "dtype": "F32",
                "shape": [0],
                "data_offsets": [0, 0],
            }
    else:
        return edit_json(chance, header)
    return dump(header).encode("utf-8", "surrogatepass"), f"{what} {name}"


def spoil_weights(chance: Random, raw: bytes) -> tuple[bytes, str]:
    """A safetensors file with a header, a length or data changed."""
    header, data = micro.split_safetensors(raw)
    what = chance.choice(("header", "header", "header", "header", "bytes", "data", "length", "cut"))
    if what == "header":
        edited, done = edit_header(chance, header, len(data))
        return micro.join_safetensors(edited, data), done
    if what == "bytes":
        return edit_bytes(chance, raw, len(raw) - len(data)), what
    if what == "data":
        return raw[: len(raw) - len(data)] + edit_bytes(chance, data), what
    if what == "length":
        length = chance.choice((0, 1, 2**63, 2**64 - 1, 10**8, len(raw), len(raw) - 8, 2**31))
        return length.to_bytes(8, "little") + raw[8:], f"length {length}"
    return raw[: chance.randrange(len(raw))], what


def _make_weights(chance: Random, folder: Path, bases: Any) -> Case:
    parts = dict(bases[0] if chance.random() < 0.7 else bases[1])
    names = [name for name in parts if "safetensors" in name]
    name = chance.choice(names)
    if name.endswith(".json"):
        tree = json.loads(parts[name])
        if chance.random() < 0.4:
            key = chance.choice(list(tree["weight_map"]))
            tree["weight_map"][key] = chance.choice((
                "../m/" + tree["weight_map"][key], "/etc/passwd", "", ".", "missing.safetensors",
                "config.json", "m\0.safetensors", "a" * 300 + ".safetensors", 5, None,
            ))  # fmt: skip
            parts[name], what = dump(tree).encode(), f"index {tree['weight_map'][key]!r}"
        else:
            parts[name], what = edit_json(chance, tree)
    else:
        parts[name], what = spoil_weights(chance, parts[name])
    place = _write(folder, parts) / name
    check = partial(_compare, place) if name.endswith(".safetensors") else None
    return Case(f"{name}: {what}", micro.checkpoint_commands(chance, "m"), check=check)


def _compare(path: Path) -> str | None:
    """Whether the safetensors library accepts the file and sees the same tensors in it."""
    import safetensors

    from quantcli.errors import SourceError
    from quantcli.sources.safetensors import read_header

    try:
        ours = read_header(path).tensors
    except SourceError:
        return None
    try:
        theirs = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        return f"accepted what safetensors refuses: {error}"
    mine = {name: (info.shape, info.dtype, info.nbytes) for name, info in ours.items()}
    same = mine == {n: (tuple(t["shape"]), t["dtype"], len(t["data"])) for n, t in theirs.items()}
    return None if same else "other tensors than safetensors reads"


def _make_settings(chance: Random, folder: Path, bases: Any) -> Case:
    parts = dict(bases[0])
    name = chance.choice(("config.json",) * 3 + ("generation_config.json", "tokenizer_config.json"))
    tree = json.loads(parts[name])
    if name == "config.json" and chance.random() < 0.3:
        tree = _rope(chance, tree)
    parts[name], what = edit_json(chance, tree)
    _write(folder, parts)
    return Case(f"{name}: {what}", micro.checkpoint_commands(chance, "m"))


def _rope(chance: Random, tree: dict[str, Any]) -> dict[str, Any]:
    """More of the settings that configurations may have."""
    added = chance.choice((
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
                             "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 64, "beta_fast": 32.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16,
                             "long_factor": [2.0] * 16, "original_max_position_embeddings": 64}},
        {"sliding_window": 16, "layer_types": ["sliding_attention"], "use_sliding_window": True},
        {"text_config": dict(tree), "vision_config": {"model_type": "siglip_vision_model"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {"num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
        {"architectures": [chance.choice(("Qwen3ForCausalLM", "MistralForCausalLM", "T5Model",
                                          "Gemma3ForCausalLM", "BertModel", "Phi3ForCausalLM"))]},
        {"auto_map": {"AutoModel": "x.Y"}, "num_nextn_predict_layers": 1},
    ))  # fmt: skip
    return {**tree, **added}


def _make_places(chance: Random, folder: Path, bases: Any) -> Case:
    parts = dict(bases[0] if chance.random() < 0.6 else bases[1])
    place = _write(folder, parts)
    names = sorted(parts)
    done = []
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(names)
        done.append(f"{name} {spoil_file(chance, place / name)}")
    if chance.random() < 0.15:
        name = chance.choice(
            (
                "adapter_config.json",
                "adapter_model.safetensors",
                "params.json",
                "pytorch_model.bin",
                "consolidated.safetensors",
                "README.md",
                "chat_template.jinja",
                "preprocessor_config.json",
                "added_tokens.json",
                "special_tokens_map.json",
                "model.safetensors.index.json",
            )
        )
        added = place / name
        if added.is_dir() and not added.is_symlink():
            added = place / f"{name}.x"
        added.unlink(missing_ok=True)
        added.write_bytes(chance.choice((b"", b"{}", b"[]", b"\xff", b"---\n{", b'{"a": 1}')))
        done.append(f"{name} added")
    return Case("; ".join(done), micro.checkpoint_commands(chance, "m"))


def _meddle(path: Path, how: str) -> None:
    if how == "truncate":
        os.truncate(path, path.stat().st_size // 3)
    elif how == "remove":
        path.unlink()
    elif how == "replace":
        other = path.with_name("other")
        other.write_bytes(b"\0" * 100)
        other.replace(path)
    elif how == "nan":
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 64)
    else:
        os.truncate(path, path.stat().st_size * 2)


def _make_meddled(chance: Random, folder: Path, bases: Any) -> Case:
    place = _write(folder, dict(bases[1]))
    name = chance.choice([name for name in sorted(bases[1]) if name.endswith(".safetensors")])
    how = chance.choice(("truncate", "remove", "replace", "nan", "grow"))
    at = chance.choice((1, 2, 3, 4, 6, 9, 14, 20))
    meddle = partial(_meddle, place / name, how)
    once = iter((meddle,))
    commands = micro.checkpoint_commands(chance, "m")[:1]
    return Case(f"{name}: {how} at read {at}", commands, lambda: next(once, lambda: None)(), at)


KINDS = (
    Kind("weights", _warm, _make_weights),
    Kind("settings", _warm, _make_settings),
    Kind("places", _warm, _make_places),
    Kind("meddled", _warm, _make_meddled),
)
