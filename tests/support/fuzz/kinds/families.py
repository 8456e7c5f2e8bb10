"""Configurations and tensors of many families and of towers, with processors beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import dump, edit_json
from support.fuzz.kinds.checkpoints import edit_header
from support.fuzz.values import odd, odd_like

_SOME = ("qwen3", "gemma3", "deepseek-v3", "gpt-oss", "mamba2", "qwen3-next", "llama4", "phi3")
_TOWERS = ("gemma3", "qwen2.5-vl", "smolvlm", "pixtral")
_MOST = 16 << 20
"""Bytes of a model: the few larger ones would take the time of hundreds of others."""
_BUILD = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from support.fuzz.kinds.families import build_all
build_all(Path(sys.argv[1]), sys.argv[2:])
"""


def build_all(folder: Path, names: list[str]) -> None:
    """Write the tiny models and towers ("tower:NAME"); without names all of them."""
    from support.tiny.untabled import UNTABLED
    from support.tiny_models import ENCODERS, MODELS, TRANSLATORS, build
    from support.tiny_towers import TINY
    from support.tiny_towers import build as build_tower

    known = {**MODELS, **ENCODERS, **TRANSLATORS, **UNTABLED}
    for name in names or [*known, *(f"tower:{name}" for name in TINY)]:
        if name.startswith("tower:"):
            if name[6:] in TINY:
                build_tower(name[6:], folder / name)
        elif name in known:
            build(name, folder / name, dtype="bfloat16")


def _warm(names: tuple[str, ...], folder: Path) -> Any:
    # In a process of its own: torch would make every fork slower.
    paths = [str(Path(__file__).parents[3]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-c", _BUILD, folder, *names], env=environment, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    # Two tokenizers of 4,096 tokens would take more time than all else.
    small = {name: raw for name, raw in micro.files().items() if "tokenizer" in name}
    found = {path.name: {**micro.read(path), **small} for path in sorted(folder.iterdir())}
    found = {name: parts for name, parts in found.items() if sum(map(len, parts.values())) < _MOST}
    assert len(found) > len(names) // 2
    return found


def _make(chance: Random, folder: Path, bases: Any) -> Case:
    name = chance.choice(sorted(bases))
    parts = dict(bases[name])
    what = chance.choice(("tree", "tree", "key", "key", "inner", "tensors", "processor", "class"))
    config = json.loads(parts["config.json"])
    inner = [key for key, value in config.items() if isinstance(value, dict) and value]
    if what == "processor" and "preprocessor_config.json" in parts:
        tree = json.loads(parts["preprocessor_config.json"])
        tree |= chance.choice(
            (
                {},
                {"size": {"height": 64, "width": 64}},
                {"do_resize": True, "patch_size": 14},
                {"image_processor": {"image_mean": [0.5] * 3}},
                {"feature_extractor": {}},
            )
        )
        file = chance.choice(("preprocessor_config.json", "processor_config.json"))
        parts[file], what = edit_json(chance, tree)
        what = f"{file} {what}"
    elif what == "tensors":
        file = next(name for name in parts if name.endswith(".safetensors"))
        header, data = micro.split_safetensors(parts[file])
        edited, what = edit_header(chance, header, len(data))
        parts[file] = micro.join_safetensors(edited, data)
    elif what == "class":
        config["architectures"] = [chance.choice((*_CLASSES, odd(chance)))]
        parts["config.json"], what = (
            dump(config).encode("utf-8", "surrogatepass"),
            str(config["architectures"])[:60],
        )
    elif what == "inner" and inner:
        key = chance.choice(inner)
        deeper = chance.choice(list(config[key]))
        config[key][deeper] = odd_like(chance, config[key][deeper])
        what = f"{key}.{deeper} {str(config[key][deeper])[:40]!r}"
        parts["config.json"] = dump(config).encode("utf-8", "surrogatepass")
    elif what == "key":
        key = chance.choice(list(config))
        config[key] = odd_like(chance, config[key])
        what = f"{key} {str(config[key])[:40]!r}"
        parts["config.json"] = dump(config).encode("utf-8", "surrogatepass")
    else:
        parts["config.json"], what = edit_json(chance, config)
    micro.write(folder / "m", parts)
    place, one = "../in/m", ("--threads", "1")
    choices = [
        (command("inspect", place),),
        (command("inspect", place, "--tensors", "--json"),),
        (command("quantize", place, "--dry-run", "--pre", "llama-bpe"),),
        (command("quantize", place, "--dry-run"),),
        (command("quantize", place, *chance.choice(micro.LAYOUTS), "--dry-run"),),
        (
            command("quantize", place, *chance.choice(micro.LAYOUTS), "-o", "f", *one),
            command("inspect", "f"),
        ),
        (
            command("quantize", place, "--type", "Q8_0", "-o", "m.gguf", *one),
            command("export", "m.gguf", "--to", "hf", "-o", "h", *one),
        ),
        (
            command("quantize", place, "--type", "Q4_K_M", "-o", "m.gguf", *one),
            command("inspect", "m.gguf", sound=True),
        ),
    ]
    if name.startswith("tower:"):
        choices += [
            (
                command("quantize", place, "--mmproj-only", "-o", "p.gguf", *one),
                command("inspect", "p.gguf", sound=True),
            ),
            (command("quantize", place, "--mmproj-only", "--dry-run"),),
            (command("quantize", place, "--mmproj-only", "--type", "Q8_0", "-o", "p.gguf", *one),),
        ] * 2
    return Case(f"{name}: {what}", chance.choice(choices))


_CLASSES = (
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "BertModel",
    "T5ForConditionalGeneration",
    "GPT2LMHeadModel",
    "MambaForCausalLM",
    "Gemma3ForConditionalGeneration",
    "NoSuchForCausalLM",
    "",
    "../x",
    "DeepseekV3ForCausalLM",
    "WhisperForConditionalGeneration",
    "LlamaForSequenceClassification",
)

KINDS = (
    Kind(
        "families",
        partial(_warm, (*_SOME, *(f"tower:{name}" for name in _TOWERS))),
        _make,
        trials=250,
    ),
    Kind("all-families", partial(_warm, ()), _make, trials=0),
)
