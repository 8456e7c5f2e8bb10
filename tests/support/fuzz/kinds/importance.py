"""Importance matrices in both forms, and statistics files."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from random import Random
from struct import pack
from typing import Any

import numpy as np
from support.broken import legacy, legacy_entry
from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind, command
from support.fuzz.gguf_parts import take_apart
from support.fuzz.kinds.checkpoints import spoil_weights
from support.fuzz.kinds.gguf import spoil

_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-45, -0.0)


def _columns(name: str) -> int:
    return micro.INNER if name == "ffn_down" else micro.WIDTH


def _warm(folder: Path) -> Any:
    import gguf

    path = folder / "i.gguf"
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 64)
    noise = np.random.default_rng(3)
    for name in _NAMES:
        sums = noise.random((1, _columns(name)), np.float32) * 100
        writer.add_tensor(f"blk.0.{name}.weight.in_sum2", sums)
        writer.add_tensor(f"blk.0.{name}.weight.counts", np.full((1, 1), 192, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = path.read_bytes()
    dat = legacy(
        *(
            legacy_entry(f"blk.0.{name}.weight".encode(), noise.random(_columns(name)).tolist(), 3)
            for name in _NAMES
        ),
        tail=pack("<ii", 3, 8) + b"wiki.txt",
    )
    micro.model(folder)
    return {"gguf": (raw, take_apart(raw)), "dat": dat, "model": folder / "micro"}


def _legacy(chance: Random) -> tuple[bytes, str]:
    """An older file with an entry, a count or its tail changed."""
    entries = []
    place = chance.randrange(len(_NAMES))
    how = chance.choice(("values", "columns", "calls", "count", "name", "twice", "drop"))
    for number, name in enumerate(_NAMES):
        label, values, calls, count = (
            f"blk.0.{name}.weight".encode(),
            [1.0] * _columns(name),
            3,
            None,
        )
        if number == place and how == "values":
            values[chance.randrange(len(values))] = chance.choice(_FLOATS)
            if chance.random() < 0.3:
                values = [chance.choice(_FLOATS)] * len(values)
        elif number == place and how == "columns":
            values = values * 2 if chance.random() < 0.5 else values[:5]
        elif number == place and how == "calls":
            calls = chance.choice((0, -1, 2**31 - 1, -(2**31)))
        elif number == place and how == "count":
            count = chance.choice((-1, 0, 2**31 - 1, len(values) + 1))
        elif number == place and how == "name":
            label = chance.choice(
                (b"", b"\xff", b"\x1b[31m", b"a" * 100_000, b"x\0", b"output.weight")
            )
        elif number == place and how == "drop":
            continue
        entries.append(legacy_entry(label, values, calls, count=count))
        if number == place and how == "twice":
            entries.append(entries[-1])
    count = chance.choice((None, None, None, -1, 0, 2**31 - 1, 1))
    tail = chance.choice(
        (
            b"",
            pack("<ii", 3, 8) + b"wiki.txt",
            pack("<ii", -1, 2**31 - 1),
            b"\xff" * 3,
            pack("<ii", 3, 4) + b"\xff\xfe\x1b[",
        )
    )
    return legacy(*entries, count=count, tail=tail), how


def _make(chance: Random, folder: Path, bases: Any) -> Case:
    name = "i.gguf" if chance.random() < 0.6 else "i.dat"
    if name == "i.gguf":
        raw, what = spoil(chance, *bases["gguf"])
    elif chance.random() < 0.6:
        raw, what = _legacy(chance)
    else:
        raw, what = edit_bytes(chance, bases["dat"]), "bytes"
    (folder / name).write_bytes(raw)
    if chance.random() < 0.02:
        what = spoil_file(chance, folder / name)
    place, one, model = f"../in/{name}", ("--threads", "1"), bases["model"]
    commands = chance.choice(
        (
            (command("inspect", place),),
            (command("inspect", place, "--json"),),
            (command("inspect", place, "--kv"),),
            (
                command(
                    "quantize",
                    model,
                    "--type",
                    chance.choice(("Q4_0", "IQ4_NL", "Q4_K")),
                    "--imatrix",
                    place,
                    "-o",
                    "m.gguf",
                    *one,
                ),
                command("export", "m.gguf", "--verify", *one, sound=True),
            ),
            (
                command(
                    "quantize",
                    model,
                    "--to",
                    chance.choice(("gptq", "mlx")),
                    "--group-size",
                    "32",
                    "--imatrix",
                    place,
                    "-o",
                    "f",
                    *one,
                ),
            ),
            (command("quantize", model, "--type", "Q4_0", "--imatrix", place, "--dry-run"),),
            (
                command(
                    "quantize",
                    model,
                    "--type",
                    "Q4_0",
                    "--allocate",
                    "--imatrix",
                    place,
                    "-o",
                    "m.gguf",
                    *one,
                ),
            ),
            (
                command("export", place, "--to", "imatrix", "-o", "j.gguf"),
                command("inspect", "j.gguf", sound=True),
            ),
            (
                command("export", place, "--to", "dat", "-o", "j.dat"),
                command("inspect", "j.dat", sound=True),
            ),
            (command("calibrate", place, "--stats"),),
            (command("calibrate", place, "--stats", "--json"),),
            (
                command("calibrate", "--merge", place, "--merge", place, "-o", "k.gguf"),
                command("inspect", "k.gguf", sound=True),
            ),
        )
    )
    return Case(f"{name}: {what}", commands)


def _statistics() -> tuple[dict[str, Any], bytes]:
    """A statistics file as `calibrate --collect` writes it: its header and data."""
    noise = np.random.default_rng(5)
    header: dict[str, Any] = {"__metadata__": {"format": "FORMAT", "hessian_of": "{}"}}
    data = b""
    for name in _NAMES:
        columns = _columns(name)
        inputs = noise.standard_normal((columns, columns))
        parts = {
            "hessian": (inputs @ inputs.T).astype(np.float32),
            "abs_max": np.ones(columns, np.float32),
            "mean_abs": np.ones(columns, np.float32),
            "counts": np.full(1, 64, np.int64),
        }
        for part, values in parts.items():
            kind = "I64" if values.dtype == np.int64 else "F32"
            header[f"blk.0.{name}.weight.{part}"] = {
                "dtype": kind, "shape": list(values.shape),
                "data_offsets": [len(data), len(data) + values.nbytes],
            }  # fmt: skip
            data += values.tobytes()
    return header, data


def _warm_statistics(folder: Path) -> Any:
    from quantcli.statistics.statistics_file import STATISTICS_FORMAT

    header, data = _statistics()
    header["__metadata__"]["format"] = STATISTICS_FORMAT
    bases = _warm(folder)
    return {**bases, "statistics": micro.join_safetensors(json.dumps(header).encode(), data)}


def _make_statistics(chance: Random, folder: Path, bases: Any) -> Case:
    raw = bases["statistics"]
    if chance.random() < 0.3:
        header, data = micro.split_safetensors(raw)
        header = deepcopy(header)
        key = chance.choice(("format", "hessian_of"))
        header["__metadata__"][key] = chance.choice(
            (
                "",
                "{}",
                "[",
                '{"a": {}}',
                '{"blk.0.attn_q.weight": "x"}',
                "5",
                '{"a":"a"}',
                "[" * 50_000,
                "\ud800",
            )
        )
        raw, what = micro.join_safetensors(json.dumps(header).encode(), data), f"metadata {key}"
    else:
        raw, what = spoil_weights(chance, raw)
    (folder / "c.calib.gguf").write_bytes(bases["gguf"][0])
    name = "c.calib.safetensors"
    (folder / name).write_bytes(raw)
    if chance.random() < 0.03:
        what = spoil_file(chance, folder / name)
    place = chance.choice(("../in/c.calib.gguf", f"../in/{name}"))
    commands = chance.choice(
        (
            (command("calibrate", place, "--stats"),),
            (command("calibrate", place, "--stats", "--json"),),
            (command("inspect", place),),
            (command("calibrate", "--merge", place, "--merge", place, "-o", "k.gguf"),),
        )
    )
    return Case(f"{name}: {what}", commands)


KINDS = (
    Kind("importance", _warm, _make, ("quantcli.calibration",)),
    Kind("statistics", _warm_statistics, _make_statistics, ("quantcli.calibration",)),
)
