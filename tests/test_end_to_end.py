"""Every architecture through the whole of quantcli: the file that llama.cpp gets is the right one.

tests/archs proves the tables' logits with files that are written by plain means; here the real
pipeline's files hold the same tensors and keys, load in llama.cpp, and tokenize alike.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support.tiny_models import MODELS, build

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import write_artifact
from quantcli.model import open_model
from quantcli.plan.recipe import Recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")
llama_cpp = pytest.importorskip("llama_cpp")

TEXT = "It was the best of times — 1859: the worst!\n\n  “Isn't it?” 東京 😀 ça\t\n"


def quantize(source: Path, output: Path, type_name: str) -> Path:
    with open_model(source) as model:
        list(write_artifact(prepare_gguf(model, Recipe(type=type_name), output), threads=2))
    return output


@pytest.mark.parametrize("name", MODELS)
def test_files_of_every_architecture(name: str, tmp_path: Path) -> None:
    from support.gguf_models import write_model
    from tokenizers import Tokenizer

    folder = build(name, tmp_path / "model", dtype="bfloat16")
    ours = quantize(folder, tmp_path / "ours.gguf", "BF16")
    plain = write_model(folder, tmp_path / "plain.gguf", dtype="BF16")
    mine, reference = GGUFReader(ours), GGUFReader(plain)
    stored = {t.name: t for t in reference.tensors}
    assert {t.name for t in mine.tensors} == stored.keys()
    for tensor in mine.tensors:
        assert tensor.tensor_type == stored[tensor.name].tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.data, stored[tensor.name].data, tensor.name)
    arch = mine.get_field("general.architecture").contents()
    keys = {key for key in reference.fields if key.startswith(f"{arch}.")}
    assert {key for key in mine.fields if key.startswith(f"{arch}.")} == keys
    for key in keys:
        assert mine.get_field(key).contents() == reference.get_field(key).contents()
    loaded = llama_cpp.Llama(str(ours), n_ctx=64, verbose=False, n_threads=2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"<|begin_of_text|>{TEXT}<|end_of_text|>"
    ids = loaded.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_four_bits_keep_the_models_english(tmp_path: Path) -> None:
    """The small model at 4 bits prefers the same next token in most places of its own prose."""
    mini = Path(__file__).parent / "data" / "bookworm-mini"
    logits = []
    for type_name in ("BF16", "Q4_K_M"):
        path = quantize(mini, tmp_path / f"{type_name}.gguf", type_name)
        model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=2)
        prompt = "It was a dark and stormy night, and the captain of the ship said nothing to him "
        tokens = model.tokenize((prompt * 3).encode())
        model.eval(tokens)
        logits.append(np.array(model.scores[: len(tokens)]))
    same = (logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).mean()
    assert same > 0.75
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.97


def test_command_line_from_checkpoint_to_running_file(tmp_path: Path) -> None:
    mini = Path(__file__).parent / "data" / "bookworm-mini"
    done = subprocess.run(
        [sys.executable, "-m", "quantcli", "quantize", str(mini), "--bits", "4", "-q"],
        capture_output=True, cwd=tmp_path, check=True, text=True,
    )  # fmt: skip
    assert done.stdout == "bookworm-mini-Q4_K_M.gguf\n"
    assert done.stderr == ""
    model = llama_cpp.Llama(str(tmp_path / done.stdout.strip()), n_ctx=64, verbose=False)
    answer = model("It was a", max_tokens=8, temperature=0)
    assert answer["choices"][0]["text"].strip()
