"""--override-kv against the key-values that the real llama-quantize writes."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader
from support.llama_plan import dry_run, write_hollow
from support.llama_quantize import llama_quantize
from support.model_shapes import MODELS

from quantcli.errors import UsageError
from quantcli.plan.override import resolve_overrides
from quantcli.plan.planner import make_plan
from quantcli.plan.recipe import Recipe
from quantcli.types import MetaValue
from quantcli.types import text as text_value


def test_types_and_values_are_those_of_llama_quantize(tmp_path: Path) -> None:
    entries = {
        "llama.context_length=int:4096": ("INT", "val_i64", 4096),
        "my.int=int:7": ("INT", "val_i64", 7),
        "llama.rope.freq_base=float:1e6": ("FLOAT", "val_f64", 1e6),
        "my.float=float:0.1": ("FLOAT", "val_f64", 0.1),
        "tokenizer.ggml.add_bos_token=bool:true": ("BOOL", "val_bool", True),
        "my.no=bool:false": ("BOOL", "val_bool", False),
        "general.name=str:a = b: ü": ("STR", "val_str", "a = b: ü".encode()),
        "general.file_type=int:3": ("INT", "val_i64", 3),
    }
    rows = (llama_cpp.llama_model_kv_override * (len(entries) + 1))()
    for row, (text, (tag, field, value)) in zip(rows, entries.items(), strict=False):
        row.tag = getattr(llama_cpp, f"LLAMA_KV_OVERRIDE_TYPE_{tag}")
        row.key = text.partition("=")[0].encode()
        setattr(row.value, field, value)
    model = MODELS["llama-2"]()
    source = write_hollow(tmp_path / "in.gguf", model)
    output = tmp_path / "out.gguf"
    llama_quantize(source, output, "Q8_0", kv_overrides=ctypes.cast(
        rows, ctypes.POINTER(llama_cpp.llama_model_kv_override)
    ))  # fmt: skip
    fields = GGUFReader(output).fields
    kinds = {"u32": "UINT32", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING"}
    for key, value in resolve_overrides(entries, model.metadata()).items():
        field = fields[key]
        assert field.types[0].name == kinds[value.kind]
        found = field.contents()
        assert found == (np.float32(value.value) if value.kind == "f32" else value.value)


def test_the_mixture_sees_the_new_values(tmp_path: Path) -> None:
    model = MODELS["mixtral-4"]()
    path = write_hollow(tmp_path / "model.gguf", model)
    recipe = Recipe(type="Q4_K_M", override_kv=("llama.expert_count=int:8",))
    plan = make_plan(model.output_tensors(), model.metadata(), recipe, from_gguf=True)
    assert [(item.tensor.name, item.format) for item in plan.items] == dry_run(
        path, "Q4_K_M", override_kv={"llama.expert_count": 8}
    )
    assert plan.overrides == {"llama.expert_count": MetaValue("u32", 8)}


@pytest.mark.parametrize(
    ("value", "existing", "kind"),
    [
        (0, None, "u32"), (2**32 - 1, None, "u32"), (2**32, None, "u64"), (-1, None, "i32"),
        (-(2**31) - 1, None, "i64"), (5, "u16", "u16"), (70000, "u16", "u32"), (5, "i32", "i32"),
        (-5, "u32", "i32"), (5, "str", "u32"), (5, "[u32]", "u32"), (5, "u64", "u64"),
    ],
)  # fmt: skip
def test_an_integer_keeps_the_models_type_if_it_fits(
    value: int, existing: str | None, kind: str
) -> None:
    metadata = {} if existing is None else {"k": MetaValue(existing, 0)}
    assert resolve_overrides([f"k=int:{value}"], metadata) == {"k": MetaValue(kind, value)}


def test_the_later_of_two_counts() -> None:
    assert resolve_overrides(["k=int:1", "k=str:b"], {}) == {"k": MetaValue("str", "b")}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("k", "not KEY=TYPE:VALUE"),
        ("=int:1", "not KEY=TYPE:VALUE"),
        ("k=1", "not KEY=TYPE:VALUE"),
        ("k=u32:1", "not KEY=TYPE:VALUE"),
        ("k=int:1x", "'1x' is not of type int"),
        ("k=int:", "'' is not of type int"),
        ("k=int:18446744073709551616", "does not fit in 64 bits"),
        ("k=float:abc", "'abc' is not of type float"),
        ("k=float:inf", "must be finite"),
        ("k=bool:yes", "a bool is true or false"),
        ("k" * 128 + "=int:1", "at most 127 bytes"),
        ("general.alignment=int:64", "cannot be set"),
        ("split.count=int:2", "cannot be set"),
        ("quantcli.recipe=str:x", "cannot be set"),
    ],
)
def test_what_is_refused(entry: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_overrides([entry], {})


def test_the_longest_key_and_string_are_accepted() -> None:
    key, value = "k" * 127, "ü" * 63 + "x"
    assert resolve_overrides([f"{key}=str:{value}"], {}) == {key: MetaValue("str", value)}


def test_a_long_string_and_a_files_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}ü{{ m.content }}{% endfor %}" * 50
    file = tmp_path / "template.jinja"
    file.write_text(template, encoding="utf-8")
    entries = [f"a=str:{template}", f"b=str:@{file}"]
    assert resolve_overrides(entries, {}) == {"a": text_value(template), "b": text_value(template)}


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "is not a file"), (b"\xff", "is not UTF-8 at byte 0")]
)
def test_a_file_that_cannot_be_read(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "x"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        resolve_overrides([f"k=str:@{file}"], {})
