"""The ``general.*`` keys are those that gguf's own Metadata writes, as its reader finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantcli.errors import SourceError
from quantcli.formats.container import VALUE_KINDS
from quantcli.sources.card import ParameterCount, count_parameters, general_metadata
from quantcli.types import MetaValue, OutputTensor

FULL_CARD = """---
license: other
license_name: my-licence
license_link: https://example.org/LICENSE
language:
- en
- no
- de
tags:
- chat
- quantization
pipeline_tag: text-generation
base_model:
- meta-llama/Llama-3.1-8B
- https://huggingface.co/mistralai/Mistral-7B-v0.1
datasets:
- allenai/c4
- name: Own set
  author: Someone
  url: https://example.org/data
author: Some One
organization: Some Org
description: A model that says little.
version: v1.2
url: https://example.org/model
doi: 10.1000/182
uuid: 123e4567
repo_url: https://example.org/repo
---
# A model
"""

CARDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "nothing but a folder": ("Tiny-Thing", "", {}, {}),
    "a name with everything": ("Mixtral-8x7B-Instruct-v0.1", "", {}, {}),
    "a path in the config": ("x", "", {"_name_or_path": "org/Base-3B-Chat"}, {}),
    "a long card": ("model", FULL_CARD, {}, {}),
    "one language, one tag": (
        "m-1B",
        "---\nlanguage: en\ntags: chat\nlicense: mit\nbase_model: org/Base-1B\n---\n",
        {},
        {},
    ),
    "several licences": ("m", "---\nlicense:\n- mit\n- apache-2.0\n---\n", {}, {}),
    "names by other keys": (
        "m",
        "---\nmodel_name: The Name\nmodel_creator: TheMaker\nmodel_type: llama\n---\n",
        {},
        {},
    ),
    "no front matter": ("m-7B", "# Title\n---\nlicense: mit\n---\n", {}, {}),
    "an empty card": ("m-7B", "\n", {}, {}),
    "tabs in the card": ("m", "---\nlicense:\tmit\ntags:\n-\tchat\n---\n", {}, {}),
    "sampling": (
        "m",
        "",
        {},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "do_sample": True},
    ),
    "sampling, rare": (
        "m",
        "",
        {},
        {"penalty_repeat": 1.1, "mirostat": 2, "mirostat_tau": 5.0, "sequence": "tkp"},
    ),
    "sampling, null": ("m", "", {}, {"temperature": None, "top_p": 0.5}),
    "sampling, whole numbers": ("m", "", {}, {"temperature": 1, "top_p": 1}),
}


def build(folder: Path, card: str, config: dict[str, Any], generation: dict[str, Any]) -> Path:
    folder.mkdir()
    if card:
        (folder / "README.md").write_text(card)
    (folder / "config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def by_gguf(folder: Path, total: int, out: Path) -> dict[str, MetaValue]:
    """What the converter's steps write, read back: type, then the metadata it loads."""
    metadata = gguf.Metadata.load(None, folder, None, total)
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(total, total, 0, 0)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found: dict[str, MetaValue] = {}
    for name, field in gguf.GGUFReader(out).fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = [VALUE_KINDS.get(int(kind), "array") for kind in field.types]
            kind = kinds[0] if len(kinds) == 1 else f"[{kinds[1]}]"
            found[name] = MetaValue(kind, field.contents())
    return found


@pytest.mark.parametrize("name", CARDS)
def test_keys_are_ggufs(name: str, tmp_path: Path) -> None:
    label, card, config, generation = CARDS[name]
    folder = build(tmp_path / label, card, config, generation)
    total = 7_241_732_096
    ours = general_metadata(folder, config=config, parameters=total)
    theirs = by_gguf(folder, total, tmp_path / "out.gguf")
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        rounded = float(np.float32(value.value)) if value.kind == "f32" else value.value
        assert MetaValue(value.kind, rounded) == theirs[key], key


def test_repetition_penalty(tmp_path: Path) -> None:
    """The name that transformers uses counts where GGUF's own is absent."""
    folder = build(tmp_path / "m", "", {}, {"repetition_penalty": 1.05})
    keys = general_metadata(folder, config={}, parameters=1)
    assert keys["general.sampling.penalty_repeat"] == MetaValue("f32", 1.05)


def test_repository_instead_of_a_folder(tmp_path: Path) -> None:
    """A snapshot's folder is named by its commit, which says nothing."""
    folder = build(tmp_path / "0123456789abcdef", "---\nlicense: mit\n---\n", {}, {})
    keys = general_metadata(folder, config={}, parameters=8 * 10**9, name="some-org/Great-8B-Chat")
    named = {key.removeprefix("general."): value.value for key, value in keys.items()}
    assert named == {
        "type": "model",
        "name": "Great 8B Chat",
        "organization": "Some Org",
        "finetune": "Chat",
        "basename": "Great",
        "size_label": "8B",
        "license": "mit",
    }


def test_a_name_of_the_users_choice(tmp_path: Path) -> None:
    folder = build(tmp_path / "folder", "---\nname: Card\n---\n", {}, {})
    keys = general_metadata(folder, config={}, parameters=1, name="My model")
    assert keys["general.name"].value == "My model"


def test_yaml_that_is_not_text_becomes_text(tmp_path: Path) -> None:
    """A version of 1.0, a date and a number among the tags stop no conversion."""
    card = "---\nversion: 1.0\nauthor: 2024-05-01\ntags: [1, true, x]\ndatasets: [{name: 7}]\n---\n"
    keys = general_metadata(build(tmp_path / "m", card, {}, {}), config={}, parameters=1)
    assert keys["general.version"] == MetaValue("str", "1.0")
    assert keys["general.author"] == MetaValue("str", "2024-05-01")
    assert keys["general.tags"] == MetaValue("[str]", ["1", "True", "x"])
    assert keys["general.dataset.0.name"] == MetaValue("str", "7")


def test_folder_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(build(tmp_path / "Some-7B", "", {}, {}))
    keys = general_metadata(Path(), config={}, parameters=7 * 10**9)
    assert keys["general.name"].value == "Some 7B"


def test_experts(tmp_path: Path) -> None:
    folder = build(tmp_path / "m", "", {}, {})
    counted = ParameterCount(46_702_792_704, 1_605_636_096, 5_637_144_576, 8)
    keys = general_metadata(folder, config={}, parameters=counted)
    assert keys["general.size_label"].value == gguf.size_label(
        counted.total, counted.shared, counted.expert, counted.experts
    )


def test_parameters_are_counted_as_gguf_counts_them(tmp_path: Path) -> None:
    shapes = {
        "token_embd.weight": (100, 8),
        "blk.0.ffn_up_exps.weight": (4, 16, 8),
        "blk.0.ffn_up_exps.bias": (4, 16),
        "blk.1.ffn_up_exps.weight": (8, 16, 8),
        "output_norm.weight": (8,),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    counted = count_parameters(OutputTensor(n, s, "F32") for n, s in shapes.items())
    assert (
        counted.total,
        counted.shared,
        counted.expert,
        counted.experts,
    ) == writer.get_total_parameter_count()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("generation_config.json", b"{", "generation_config.json: is not JSON"),
        ("generation_config.json", b"[]", "generation_config.json: holds a JSON list"),
        ("generation_config.json", b'{"top_k": "20"}', "sampling.top_k is '20'; a number belongs"),
        ("generation_config.json", b'{"top_k": 0.5}', "sampling.top_k is 0.5; a number belongs"),
        ("generation_config.json", b'{"top_p": NaN}', "sampling.top_p is nan; a number belongs"),
        ("generation_config.json", b'{"top_k": true}', "sampling.top_k is True; a number belongs"),
    ],
)
def test_broken_settings(file: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    folder = build(tmp_path / "m", "", {}, {})
    (folder / file).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        general_metadata(folder, config={}, parameters=1)
    assert sentence in str(caught.value)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"---\na: [1\n---\n", "the front matter is not YAML"),
        (b"---\nlicense: a: b\n---\n", "the front matter is not YAML"),
        (b"---\nname: \xff\n---\n", "not UTF-8 at byte 10"),
        (b"---\na: " + b"[" * 20_000 + b"\n---\n", "the front matter is not YAML"),
    ],
)
def test_a_broken_card_costs_its_keys_alone(content: bytes, sentence: str, tmp_path: Path) -> None:
    folder = build(tmp_path / "m", "", {}, {})
    whole = general_metadata(folder, config={}, parameters=1)
    (folder / "README.md").write_bytes(content)
    notes: list[str] = []
    assert general_metadata(folder, config={}, parameters=1, on_note=notes.append) == whole
    (note,) = notes
    assert note.startswith(f"{folder / 'README.md'}: {sentence}")
    assert note.endswith("nothing is taken from the model card")
    assert "\n" not in note
