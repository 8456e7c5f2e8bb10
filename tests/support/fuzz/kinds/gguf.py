"""GGUF files: key-values, tensor lines and data changed, alone or in a set of shards."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from random import Random
from struct import pack
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind, command
from support.fuzz.gguf_parts import ARRAY, STRING, Info, Pair, Parts, string, take_apart
from support.fuzz.json_edits import edit_json
from support.fuzz.kinds.templates import BOMBS
from support.fuzz.values import odd_text

_LARGE = (0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38, -0.0, 1e-45)
_KEYS = (
    b"general.architecture", b"general.alignment", b"general.type", b"split.count", b"split.no",
    b"split.tensors.count", b"general.file_type", b"tokenizer.chat_template", b"llama.block_count",
    b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges", b"general.name", b"general.license",
    b"quantcli.recipe", b"general.base_model.count", b"llama.vocab_size", b"imatrix.chunk_count",
    b"tokenizer.ggml.pre", b"llama.rope.scaling.type", b"llama.expert_count", b"",
)  # fmt: skip


def _warm(folder: Path) -> Any:
    micro.model(folder)
    files = {kind: micro.gguf(folder, kind).read_bytes() for kind in ("Q8_0", "F16", "Q4_K_M")}
    target = folder / "set.gguf"
    micro.run("export", folder / "micro-Q8_0.gguf", "--to", "gguf", "--split-max-size", "60K",
              "-o", target)  # fmt: skip
    shards = {path.name: path.read_bytes() for path in sorted(folder.glob("set*.gguf"))}
    return {"files": {k: (raw, take_apart(raw)) for k, raw in files.items()}, "shards": shards}


def _value(chance: Random) -> tuple[int, bytes]:
    """Some value of some type."""
    code = chance.randrange(13)
    if code == STRING:
        return code, string(odd_text(chance).encode("utf-8", "surrogatepass"))
    if code == 6:
        return code, pack("<f", chance.choice(_FLOATS))
    if code == 12:
        return code, pack("<d", chance.choice((*_FLOATS, 1e300)))
    if code == ARRAY:
        return STRING, string(b"")
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 7: 1, 10: 8, 11: 8}
    return code, (chance.choice(_LARGE) & (1 << 8 * sizes[code]) - 1).to_bytes(
        sizes[code], "little"
    )


def _change_pair(chance: Random, parts: Parts) -> str:
    at = chance.randrange(len(parts.pairs))
    pair = parts.pairs[at]
    name = pair.key.decode()
    what = chance.choice(
        (
            "value",
            "value",
            "value",
            "near",
            "drop",
            "twice",
            "type",
            "key",
            "add",
            "items",
            "items",
            "count",
            "nest",
            "template",
            "move",
        )
    )
    if what == "value":
        pair.code, pair.value = _value(chance)
        pair.items = None
    elif what == "near" and pair.items is None and pair.code not in (STRING, ARRAY):
        number = int.from_bytes(pair.value, "little")
        near = chance.choice((number + 1, number - 1, number * 2, number // 2, 0, 2**31, 2**63 - 1))
        pair.value = (near & (1 << 8 * len(pair.value)) - 1).to_bytes(len(pair.value), "little")
        what = f"{number} became {near}"
    elif what == "drop":
        del parts.pairs[at]
    elif what == "twice":
        parts.pairs.append(deepcopy(pair))
    elif what == "type":
        pair.code = chance.choice((*range(14), 255, 2**32 - 1))
    elif what == "key":
        pair.key = chance.choice(
            (b"", b"\xff\xfe", b"a" * 70_000, b"x\0y", b"\x1b[31m", pair.key + b"\n", b"llama.")
        )
    elif what == "add":
        code, value = _value(chance)
        parts.pairs.insert(at, Pair(chance.choice(_KEYS), code, value))
    elif what == "items":
        arrays = [pair for pair in parts.pairs if pair.items is not None]
        pair = chance.choice(arrays)
        name = pair.key.decode()
        assert pair.items is not None
        how = chance.choice(("cut", "empty", "odd", "same", "long", "swap", "more"))
        if how == "cut":
            pair.items = pair.items[: len(pair.items) // 2]
        elif how == "empty":
            pair.items = []
        elif how == "odd" and pair.items:
            place = chance.randrange(len(pair.items))
            size = len(pair.items[place])
            pair.items[place] = (
                string(odd_text(chance).encode("utf-8", "surrogatepass"))
                if pair.sub == STRING
                else chance.choice((b"\xff", b"\0", b"\x7f")) * size
            )
        elif how == "same" and pair.items:
            pair.items = [pair.items[0]] * len(pair.items)
        elif how == "long" and pair.items:
            pair.items[0] = string(b"ab" * 100_000) if pair.sub == STRING else pair.items[0] * 1
        elif how == "more":
            pair.items = pair.items * 30
        elif pair.items:
            pair.items = pair.items[::-1]
        what = f"items {how}"
    elif what == "count" and pair.items is not None:
        pair.count = chance.choice((*_LARGE, len(pair.items) + 1))
    elif what == "nest":
        depth = chance.choice((2, 50, 2000, 50_000))
        pair.code, pair.items = ARRAY, None
        pair.value = pack("<IQ", ARRAY, 1) * depth + pack("<IQ", 0, 1) + b"\1"
        what = f"nest {depth}"
    elif what == "template":
        text = chance.choice(BOMBS).encode("utf-8", "surrogatepass")
        parts.pairs = [p for p in parts.pairs if p.key != b"tokenizer.chat_template"]
        parts.pairs.append(Pair(b"tokenizer.chat_template", STRING, string(text)))
        name = text[:40].decode("utf-8", "replace")
    else:
        parts.pairs.append(parts.pairs.pop(at))
    return f"{what} {name[:60]!r}"


def _change_info(chance: Random, parts: Parts) -> str:
    at = chance.randrange(len(parts.infos))
    info = parts.infos[at]
    what = chance.choice(
        (
            "dims",
            "dims",
            "axes",
            "type",
            "type",
            "offset",
            "name",
            "drop",
            "twice",
            "swap",
            "add",
            "many",
            "empty",
        )
    )
    if what == "dims":
        place = chance.randrange(len(info.dims))
        dim = info.dims[place]
        info.dims[place] = chance.choice((*_LARGE, dim + 1, dim - 1, dim * 2, dim // 2, dim + 32))
        what = f"dims {info.dims}"
    elif what == "axes":
        info.dims = chance.choice(
            (
                [],
                [1] * 4 + info.dims,
                [*info.dims, 1],
                info.dims[:1],
                [2**32, 2**32],
                [0, 5],
                [1] * 5000,
                info.dims[::-1],
                [2**63, 0],
            )
        )
    elif what == "type":
        info.type_id = chance.choice((*range(45), 255, 2**31, 2**32 - 1))
        what = f"type {info.type_id}"
    elif what == "offset":
        info.offset = chance.choice(
            (*_LARGE, info.offset + 1, info.offset + 32, info.offset - 32, 16)
        )
        what = f"offset {info.offset}"
    elif what == "name":
        info.name = chance.choice(
            (
                b"",
                b"\xff",
                b"x" * 65,
                b"x" * 70_000,
                b"a\0b",
                b"\x1b[31m",
                b"blk.99.attn_q.weight",
                b"blk.-1.attn_q.weight",
                b"blk.99999999999.ffn_up.weight",
                b"output.weight",
                b"../x",
                b"rope_freqs.weight",
                info.name.upper(),
                b"v.blk.0.x",
            )
        )
        what = f"name {info.name[:20]!r}"
    elif what == "drop":
        del parts.infos[at]
    elif what == "twice":
        parts.infos.append(deepcopy(info))
    elif what == "swap":
        other = chance.choice(parts.infos)
        info.offset, other.offset = other.offset, info.offset
    elif what == "add":
        parts.infos.append(Info(b"blk.0.extra.weight", [32, 1], 0, len(parts.data)))
    elif what == "many":
        parts.infos += [Info(b"t%d" % n, [32], 0, 0) for n in range(chance.choice((500, 5000)))]
    else:
        parts.infos = []
    return f"{what} ({info.name[:30]!r})"


def spoil(chance: Random, raw: bytes, parts: Parts) -> tuple[bytes, str]:
    """The file with something changed."""
    choice = chance.random()
    if choice < 0.12:
        return edit_bytes(chance, raw, len(raw) - len(parts.data)), "bytes"
    parts = deepcopy(parts)
    if choice < 0.2:
        parts.data = edit_bytes(chance, parts.data)
        return parts.pack(), "data"
    if choice < 0.26:
        how = chance.choice(("tensors", "pairs", "magic", "version"))
        if how == "tensors":
            parts.tensor_count = chance.choice((*_LARGE, 2))
        elif how == "pairs":
            parts.pair_count = chance.choice((*_LARGE, 2))
        elif how == "magic":
            parts.head = chance.choice(
                (
                    b"GGUF\0\0\0\3",
                    b"GGUF\1\0\0\0",
                    b"GGUF\2\0\0\0",
                    b"GGUF\4\0\0\0",
                    b"ggml\3\0\0\0",
                )
            )
        else:
            parts.head = b"GGUF" + pack("<I", chance.choice((0, 1, 2, 4, 99, 2**31)))
        return parts.pack(), how
    done = []
    for _ in range(chance.choices((1, 2, 3), (7, 2, 1))[0]):
        pair = chance.random() < 0.6 or not parts.infos
        try:
            done.append(_change_pair(chance, parts) if pair else _change_info(chance, parts))
        except (IndexError, ValueError):
            # An earlier change emptied what this one wanted.
            done.append("nothing")
    return parts.pack(), "; ".join(done)


def _commands(chance: Random, name: str) -> tuple[Any, ...]:
    place, one = f"../in/{name}", ("--threads", "1")
    return (
        chance.choice(
            (
                command("inspect", place),
                command("inspect", place, "--kv"),
                command("inspect", place, "--json", "--tensors"),
                command("inspect", place, "--kv", "--json"),
                command("inspect", place, "--stats", *one),
                command("export", place, "--verify", *one),
                command("export", place, "--verify", *one, "--json"),
                command("export", place, "--to", "hf", "-o", "back", *one),
                command("export", place, "--to", "hf", "--dry-run"),
                command("export", place, "--to", "gguf", "-o", "g.gguf", *one),
                command("export", place, "--to", "gguf", "--dtype", "f16", "-o", "g.gguf", *one),
                command(
                    "export",
                    place,
                    "--to",
                    "gguf",
                    "--split-max-size",
                    "100K",
                    "-o",
                    "g.gguf",
                    *one,
                ),
                command("export", place, "--to", "ollama", "-o", "Modelfile"),
                command("export", place, "--to", "card", "-o", "c.md"),
                command(
                    "export",
                    place,
                    "--to",
                    chance.choice(("mlx", "gptq", "awq", "compressed-tensors")),
                    "-o",
                    "p",
                    *one,
                    *chance.choice(((), ("--requantize",))),
                ),
                command(
                    "quantize", place, "--type", "Q4_0", "--allow-requantize", "-o", "q.gguf", *one
                ),
                command("quantize", place, "--type", "Q8_0", "--dry-run", "--allow-requantize"),
                command("quantize", place, "--to", "mlx", "--allow-requantize", "-o", "f", *one),
            )
        ),
    )


def _make(chance: Random, folder: Path, bases: Any) -> Case:
    kind = chance.choice(sorted(bases["files"]))
    raw, parts = bases["files"][kind]
    spoilt, what = spoil(chance, raw, parts)
    (folder / "m.gguf").write_bytes(spoilt)
    if chance.random() < 0.02:
        what += f" {spoil_file(chance, folder / 'm.gguf')}"
    return Case(f"{kind}: {what}", _commands(chance, "m.gguf"))


def _make_set(chance: Random, folder: Path, bases: Any) -> Case:
    shards = dict(bases["shards"])
    names = sorted(shards)
    what = chance.choice(("spoil", "spoil", "spoil", "missing", "twice", "rename", "place", "swap"))
    name = chance.choice(names)
    if what == "spoil":
        shards[name], done = spoil(chance, shards[name], take_apart(shards[name]))
        what = f"{what} {done}"
    elif what == "missing":
        del shards[name]
    elif what == "twice":
        shards[chance.choice(names)] = shards[name]
    elif what == "rename":
        shards[
            chance.choice(
                (
                    "set-00001-of-99999.gguf",
                    "set-00000-of-00002.gguf",
                    "x.gguf",
                    "set-00009-of-00002.gguf",
                    "set-99999-of-99999.gguf",
                )
            )
        ] = shards.pop(name)
    elif what == "swap":
        other = chance.choice(names)
        shards[name], shards[other] = shards[other], shards[name]
    micro.write(folder, shards)
    if what == "place":
        what = f"{what} {spoil_file(chance, folder / name)}"
    asked = chance.choice(sorted(shards) or [name])
    return Case(f"{name}: {what}", _commands(chance, asked))


def _warm_evaluated(folder: Path) -> Any:
    (folder / "t.txt").write_text(micro.TEXT * 2)
    return {**_warm(folder), "text": folder / "t.txt"}


def _make_evaluated(chance: Random, folder: Path, bases: Any) -> Case:
    """A changed file in llama.cpp itself, whose assertions would end the process."""
    kind = chance.choice(sorted(bases["files"]))
    raw, what = spoil(chance, *bases["files"][kind])
    (folder / "m.gguf").write_bytes(raw)
    windows = ("--ctx", "16", "--chunks", "2", "--threads", "1")
    run = ("eval-ppl", "../in/m.gguf", "--data", bases["text"], *windows)
    engine = chance.choice(((), (), ("--engine", "torch")))
    return Case(f"{kind}: {what}", (command(*run, *engine),))


def _make_beside(chance: Random, folder: Path, bases: Any) -> Case:
    """A sound GGUF, and odd settings or a tokenizer of the user's choice beside it."""
    (folder / "m.gguf").write_bytes(bases["files"]["Q8_0"][0])
    parts = dict(micro.files())
    name = chance.choice(("config.json", "config.json", "tokenizer.json", "tokenizer_config.json"))
    parts[name], what = edit_json(chance, json.loads(parts[name]))
    parts.pop("model.safetensors")
    place = micro.write(folder / "c", parts)
    if chance.random() < 0.1:
        what = spoil_file(chance, place / name)
    export = ("export", "../in/m.gguf", "-o", "o", "--threads", "1")
    commands = (
        command(*export, "--to", "hf", "--config", "../in/c"),
        command(*export, "--to", "hf", "--tokenizer", "../in/c"),
        command(*export, "--to", "mlx", "--config", "../in/c", "--tokenizer", "../in/c"),
        command("export", "../in/m.gguf", "--verify", "--against", "../in/c"),
    )
    return Case(f"{name}: {what}", (chance.choice(commands),))


_ENGINES = (
    "llama_cpp", "torch", "transformers", "quantcli.evals.run", "quantcli.evals.engines.torch",
)  # fmt: skip
KINDS = (
    Kind("gguf", _warm, _make),
    Kind("gguf-set", _warm, _make_set),
    Kind("gguf-beside", _warm, _make_beside, trials=100),
    Kind("evaluated", _warm_evaluated, _make_evaluated, _ENGINES, trials=100),
)
