"""Sound inputs small enough for many trials a second: a llama of one block and what is made of it.

Nothing here is random from run to run, so a trial's number always means the same input.
"""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, INNER, HEADS, GROUPS = 64, 128, 2, 1
TEXT = "The quick brown fox jumps over the lazy dog; it was a bright cold day in April. " * 12
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['role'] + ': ' + message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def tokenizer() -> str:
    """A byte-level BPE of few tokens, as ``tokenizer.json``."""
    from support.tokenizers_build import add_template
    from support.tokenizers_structures import STRUCTURES
    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as pre

    made = Tokenizer(models.BPE())
    shell = json.loads(made.to_str())
    shell["pre_tokenizer"] = STRUCTURES["llama-bpe"]
    made = Tokenizer.from_str(json.dumps(shell))
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|eos|>", "<|user|>"],
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    tree = json.loads(made.to_str())
    add_template(tree, first=["<|bos|>"])
    return json.dumps(tree)


def tokenizer_tree() -> dict[str, Any]:
    """The same, parsed."""
    tree: dict[str, Any] = json.loads(tokenizer())
    return tree


def vocabulary() -> int:
    """Its tokens."""
    tree = tokenizer_tree()
    return 1 + max(*tree["model"]["vocab"].values(), *(t["id"] for t in tree["added_tokens"]))


def config() -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "num_hidden_layers": 1, "head_dim": WIDTH // HEADS, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "vocab_size": vocabulary(), "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "float32",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "sliding_window": None,
        "transformers_version": "5.0.0",
    }  # fmt: skip


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": {
            "content": "<|eos|>",
            "lstrip": False,
            "special": True,
            "__type": "AddedToken",
        },
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {
            "0": {
                "content": "<|bos|>",
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            },
        },
        "model_max_length": 256,
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json."""
    return {
        "bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7,
        "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "min_p": 0.05, "stop_strings": ["x"],
        "transformers_version": "5.0.0",
    }  # fmt: skip


@cache
def tensors() -> dict[str, NDArray[Any]]:
    """The weights by name."""
    noise = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        return (noise.standard_normal((rows, columns)) / 8).astype(np.float32)

    block = "model.layers.0."
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH // 2, WIDTH),
        "self_attn.v_proj": (WIDTH // 2, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }  # fmt: skip
    norms = ("input_layernorm", "post_attention_layernorm")
    return {
        "model.embed_tokens.weight": matrix(vocabulary(), WIDTH),
        **{f"{block}{name}.weight": matrix(*shape) for name, shape in shapes.items()},
        **{f"{block}{name}.weight": np.ones(WIDTH, np.float32) for name in norms},
        "model.norm.weight": np.ones(WIDTH, np.float32),
        "lm_head.weight": matrix(vocabulary(), WIDTH),
    }


def split_safetensors(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_safetensors(header: bytes, data: bytes) -> bytes:
    """A file of a header and data."""
    return len(header).to_bytes(8, "little") + header + data


@cache
def files() -> dict[str, bytes]:
    """The checkpoint's files."""
    from safetensors.numpy import save

    parts = {
        "config.json": config(), "tokenizer_config.json": tokenizer_config(),
        "generation_config.json": generation_config(),
    }  # fmt: skip
    return {
        "model.safetensors": save(tensors(), {"format": "pt"}),
        "tokenizer.json": tokenizer().encode(),
        **{name: json.dumps(part).encode() for name, part in parts.items()},
    }


def sharded() -> dict[str, bytes]:
    """The same in two shards and an index."""
    from safetensors.numpy import save

    names = sorted(tensors())
    halves = names[::2], names[1::2]
    shards = {f"model-0000{n}-of-00002.safetensors": half for n, half in enumerate(halves, 1)}
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors().values())},
        "weight_map": {name: shard for shard, half in shards.items() for name in half},
    }
    rest = {name: raw for name, raw in files().items() if name != "model.safetensors"}
    return {
        **{shard: save({n: tensors()[n] for n in half}) for shard, half in shards.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        **rest,
    }


def write(folder: Path, parts: dict[str, bytes]) -> Path:
    """Write files into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in parts.items():
        (folder / name).write_bytes(raw)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def run(*args: str | Path) -> None:
    """A command that must succeed, in this process and without a word."""
    from quantcli.cli import app

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = app.run([*map(str, args), "--threads", "1"])
    if code:
        raise AssertionError(f"{args}: {said.getvalue()}")


def model(folder: Path) -> Path:
    """The checkpoint in ``folder/micro``."""
    return write(folder / "micro", files())


def gguf(folder: Path, kind: str = "Q8_0") -> Path:
    """The checkpoint as a GGUF of that type."""
    path = folder / f"micro-{kind}.gguf"
    source = folder / "micro"
    if not source.exists():
        model(folder)
    run("quantize", source, "--type", kind, "-o", path)
    return path


def packed(folder: Path, *args: str, name: str) -> dict[str, bytes]:
    """The files of the checkpoint quantized into a model folder."""
    source = folder / "micro"
    if not source.exists():
        model(folder)
    run("quantize", source, *args, "-o", folder / name)
    found = read(folder / name)
    shutil.rmtree(folder / name)
    return found


TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "IQ4_NL", "F16", "BF16", "Q5_1", "MXFP4", "IQ2_XXS", "TQ1_0")
LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("--to", "gptq", "--group-size", "32"), ("--to", "awq", "--group-size", "32"),
    ("--to", "compressed-tensors", "--group-size", "32"), ("--to", "mlx", "--group-size", "32"),
    ("--to", "fp8"), ("--to", "hf", "--type", "Q4_0"),
    ("--to", "compressed-tensors", "--scheme", "FP8_DYNAMIC"),
    ("--to", "compressed-tensors", "--scheme", "NVFP4A16"),
)  # fmt: skip


def checkpoint_commands(chance: Random, name: str, *, light: bool = False) -> tuple[Any, ...]:
    """A command or two for a checkpoint in ``../in/NAME``."""
    from support.fuzz.case import command

    place = f"../in/{name}"
    one = ("--threads", "1")
    choice = chance.random()
    if choice < 0.15 or (light and choice < 0.5):
        extra = chance.choice(((), ("--tensors",), ("--json",), ("--tensors", "--json"), ("--kv",),
                               ("--filter", "attn"), ("--sort", "size", "--tensors")))  # fmt: skip
        return (command("inspect", place, *extra),)
    if choice < 0.2:
        return (command("inspect", place, "--stats", *one),)
    if choice < 0.4:
        extra = chance.choice((("--type", "Q4_K_M"), chance.choice(LAYOUTS), ("--json",), ("-v",)))
        return (command("quantize", place, "--dry-run", *extra),)
    if choice < 0.7:
        kind = chance.choice(TYPES)
        first = command("quantize", place, "--type", kind, "-o", "m.gguf", *one)
        further = chance.choice((
            command("inspect", "m.gguf", "--json", sound=True),
            command("export", "m.gguf", "--verify", *one, sound=True),
            command("export", "m.gguf", "--to", "hf", "-o", "back", *one),
            command("export", "m.gguf", "--to", "ollama", "-o", "Modelfile"),
            command("export", "m.gguf", "--to", "card", "-o", "m.md"),
        ))  # fmt: skip
        return first, further
    if choice < 0.85:
        first = command("quantize", place, *chance.choice(LAYOUTS), "-o", "f", *one)
        further = chance.choice((
            command("inspect", "f"),
            command("export", "f", "--verify", *one),
            command("export", "f", "--to", "gguf", "-o", "f.gguf", *one),
        ))  # fmt: skip
        return first, further
    return (
        chance.choice((
            command("export", place, "--to", "gguf", "-o", "e.gguf", *one),
            command("export", place, "--to", "gguf", "--dry-run"),
            command("export", place, "--verify", *one),
            command("export", place, "--to", "card", "-o", "c.md"),
            command("quantize", place, "--print-recipe"),
        )),
    )  # fmt: skip
