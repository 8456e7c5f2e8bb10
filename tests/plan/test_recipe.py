"""Recipes: files in, text out, flags on top."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.errors import UsageError
from quantcli.plan.recipe import Recipe, merge_recipe
from quantcli.plan.recipe_file import dump_recipe, load_recipe

FULL = Recipe(
    type="Q5_K_S",
    tensor_types=(r"blk\.0\.=Q8_0", "attn_v=Q6_K"),
    output_tensor_type="Q8_0",
    token_embedding_type="Q4_0",
    leave_output_tensor=True,
    pure=True,
    imatrix="my imatrix.gguf",
    include_weights=("attn",),
    allow_requantize=True,
    override_kv=('general.name=str:"quoted" \\ and ü',),
    on_fallback="error",
    split_max_size="2G",
    pre="llama-bpe",
)


def write(folder: Path, content: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("recipe", [Recipe(), FULL, Recipe(exclude_weights=("a", "b"))])
def test_a_dumped_recipe_is_read_back_equal(tmp_path: Path, recipe: Recipe) -> None:
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.text("abc\"'\\\n\t\x7f=#")))
def test_any_text_survives_the_dump(path: str, parts: list[str]) -> None:
    recipe = Recipe(imatrix=path, include_weights=tuple(parts))
    fields = tomllib.loads(dump_recipe(recipe))
    assert fields["imatrix"] == path
    assert tuple(fields.get("include_weights", ())) == recipe.include_weights


def test_the_dump_names_the_type_and_what_differs() -> None:
    assert dump_recipe(Recipe()) == 'type = "Q4_K_M"\n'
    assert dump_recipe(Recipe(type="Q2_K", pure=True, tensor_types=("a=Q8_0", "b=F16"))) == (
        'type = "Q2_K"\ntensor_types = [\n    "a=Q8_0",\n    "b=F16",\n]\npure = true\n'
    )


def test_yaml_and_toml_mean_the_same(tmp_path: Path) -> None:
    yaml = write(
        tmp_path, "type: q3_k_l\ntensor_types: ['attn_v=Q8_0']\npure: true\n", "recipe.yaml"
    )
    toml = write(tmp_path, "type = 'q3_k_l'\ntensor_types = ['attn_v=Q8_0']\npure = true\n")
    assert load_recipe(yaml) == load_recipe(toml)
    assert load_recipe(write(tmp_path, "", "empty.yml")) == Recipe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.toml", "typo = 'x'", r"no field typo \(did you mean type\?\)"),
        ("r.toml", "tensor-type = []", "no field tensor-type .*did you mean tensor_types"),
        ("r.toml", "zzzzz = 1", "no field zzzzz .*known: type, tensor_types"),
        ("r.toml", "type = 4", r"type: expected `str`, got `int`"),
        ("r.toml", "tensor_types = 'a=Q8_0'", "tensor_types: expected `array`, got `str`"),
        ("r.toml", "tensor_types = [1]", r"tensor_types\[0\]: expected `str`, got `int`"),
        ("r.toml", "pure = 'yes'", "pure: expected `bool`, got `str`"),
        ("r.toml", "on_fallback = 'stop'", "on_fallback: invalid enum value 'stop'"),
        ("r.toml", "type = 'Q4_KM'", r"there is no type Q4_KM \(did you mean Q4_K_M\?\)"),
        ("r.toml", "output_tensor_type = 'Q9_0'", "no block format named 'Q9_0'"),
        ("r.toml", "tensor_types = ['(=Q8_0']", "not a regular expression"),
        ("r.toml", "override_kv = ['a=1']", "not KEY=TYPE:VALUE"),
        ("r.toml", "split_max_size = '2X'", "'2X' is not a size"),
        ("r.toml", "include_weights=['a']\nexclude_weights=['b']", "cannot be used together"),
        ("r.toml", "pure = true true", "not TOML: .*line 1"),
        ("r.toml", "pure = true\npure = false", "not TOML: "),
        ("r.yaml", "pure: true\npure: false", "field pure is given twice"),
        ("r.yaml", "type: [", "not YAML: .*line 1"),
        ("r.yaml", "- type", "expected a table of fields, found list"),
        ("r.yaml", "? [a]\n: 1", "not YAML|no field"),
        ("r.yaml", "1: 2", "no field 1"),
        ("r.json", "{}", "expected a .toml, .yaml or .yml file, found .json"),
        ("recipe", "", "found no suffix"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(write(tmp_path, content, name))
    assert caught.value.message.startswith(f"recipe {tmp_path / name}: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"type = '\xff'")
    with pytest.raises(UsageError, match="not UTF-8 at byte 8"):
        load_recipe(tmp_path / "binary.toml")


def test_flags_win_over_the_recipe() -> None:
    merged = merge_recipe(
        FULL, type="Q8_0", pure=None, leave_output_tensor=False, imatrix="other.dat"
    )
    assert (merged.type, merged.pure, merged.leave_output_tensor) == ("Q8_0", True, False)
    assert merged.imatrix == "other.dat"
    assert merged.split_max_size == "2G"


def test_tensor_types_of_flags_come_first() -> None:
    merged = merge_recipe(FULL, tensor_types=["attn=Q4_0"])
    assert merged.tensor_types == ("attn=Q4_0", r"blk\.0\.=Q8_0", "attn_v=Q6_K")
    assert merge_recipe(FULL, tensor_types=[]) == FULL


def test_an_override_of_flags_replaces_the_one_for_the_same_key() -> None:
    base = Recipe(override_kv=("a=int:1", "b=int:2"))
    merged = merge_recipe(base, override_kv=["a=int:3", "c=int:4"])
    assert merged.override_kv == ("b=int:2", "a=int:3", "c=int:4")


def test_filters_of_flags_replace_both_filters() -> None:
    merged = merge_recipe(FULL, exclude_weights=["ffn"])
    assert (merged.include_weights, merged.exclude_weights) == ((), ("ffn",))


def test_flags_are_checked() -> None:
    with pytest.raises(UsageError, match="no field tensor_type"):
        merge_recipe(Recipe(), tensor_type=["a=Q8_0"])
    with pytest.raises(UsageError, match="on_fallback: invalid enum value"):
        merge_recipe(Recipe(), on_fallback="never")
