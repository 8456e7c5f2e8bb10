"""``--ignore-tensor`` and ``--chat-template``: what a model is taken to hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

import quantcli
from quantcli.errors import ArchitectureError, MismatchError, PlanError, UsageError

Checkpoint = Callable[..., Path]

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}\n"


@pytest.fixture
def changed(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A Llama with two tensors that no Llama has."""
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    extra = np.ones((4, 4), np.float32)
    weights |= {"model.layers.0.adapter.weight": extra, "model.layers.1.adapter.weight": extra}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


def _fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_what_nobody_owns_is_left_out_where_it_is_named(
    changed: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError) as refused:
        quantcli.quantize(changed, tmp_path / "m.gguf", type="Q8_0")
    hint = r"--ignore-tensor 'model\.layers\.0\.adapter\.weight' leaves it out"
    assert hint in str(refused.value)
    done = quantcli.quantize(
        changed, tmp_path / "m.gguf", type="Q8_0", ignore_tensors=[r"\.adapter\."]
    )
    plain = quantcli.quantize(checkpoint("llama"), tmp_path / "plain.gguf", type="Q8_0")
    ours, theirs = (GGUFReader(each.paths[0]) for each in (done, plain))
    assert [t.data.tobytes() for t in ours.tensors] == [t.data.tobytes() for t in theirs.tensors]
    recipe = _fields(done.paths[0])["quantcli.recipe"]
    assert 'ignore_tensors = ["\\\\.adapter\\\\."]' in recipe
    (tmp_path / "again.toml").write_text(recipe)
    from quantcli.plan.recipe_file import load_recipe

    assert load_recipe(tmp_path / "again.toml").ignore_tensors == (r"\.adapter\.",)


def test_a_folder_leaves_it_out_too(changed: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(
        changed, tmp_path / "w4", to="gptq", group_size=32, ignore_tensors=["adapter"]
    )
    assert not any("adapter" in name for name in load_file(done.paths[0] / "model.safetensors"))
    assert "there is no table" not in " ".join(note.message for note in done.notes)


def test_a_gguf_leaves_it_out_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = quantcli.quantize(checkpoint("llama"), tmp_path / "f16.gguf", type="F16").paths[0]
    done = quantcli.quantize(
        source, tmp_path / "m.gguf", type="Q8_0", ignore_tensors=[r"blk\.1\.attn_norm"]
    )
    names = {tensor.name for tensor in GGUFReader(source).tensors}
    found = {tensor.name for tensor in GGUFReader(done.paths[0]).tensors}
    assert names - found == {"blk.1.attn_norm.weight"}


@pytest.mark.parametrize("to", ["gguf", "gptq"])
def test_a_pattern_that_matches_nothing_is_refused(
    to: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="--ignore-tensor adaptor matches no stored tensor"):
        quantcli.quantize(checkpoint("llama"), tmp_path / "m", to=to, ignore_tensors=["adaptor"])


def test_a_tensor_that_is_needed_stays_needed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as refused:
        quantcli.quantize(checkpoint("llama"), tmp_path / "m.gguf", ignore_tensors=["down_proj"])
    assert refused.value.message.startswith("tensor model.layers.0.mlp.down_proj.weight is missing")
    assert refused.value.hint == "--ignore-tensor leaves it out"


def test_an_expression_that_does_not_compile(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\( is not a regular expression"):
        quantcli.quantize(mini, tmp_path / "m.gguf", ignore_tensors=["("])


def test_a_template_goes_into_the_gguf_and_its_name_into_the_recipe(
    mini: Path, template: Path, tmp_path: Path
) -> None:
    done = quantcli.quantize(mini, tmp_path / "m.gguf", bits=8, chat_template=str(template))
    fields = _fields(done.paths[0])
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert 'chat_template = "own.jinja"' in fields["quantcli.recipe"]
    again = quantcli.quantize(done.paths[0], tmp_path / "again.gguf", type="Q4_0",
                              chat_template=template, allow_requantize=True)  # fmt: skip
    assert _fields(again.paths[0])["tokenizer.chat_template"] == TEMPLATE


def test_transformers_takes_the_template_of_a_folder(
    mini: Path, template: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    shutil.copytree(mini, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "the model's own"})
    )
    done = quantcli.quantize(source, tmp_path / "w4", to="awq", chat_template=str(template))
    assert (done.paths[0] / "chat_template.jinja").read_text() == TEMPLATE
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.paths[0])
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<user>hello"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "is not a file"), (b" \n", "is empty"), (b"\xff", "is not UTF-8 at byte 0")],
)
def test_a_template_that_is_none_is_refused(
    content: bytes | None, sentence: str, mini: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"--chat-template: .* {sentence}"):
        quantcli.quantize(mini, tmp_path / "m.gguf", chat_template=str(path))
