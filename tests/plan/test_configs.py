"""The recipes that come with the project: each loads, plans and does what its comment says."""

from pathlib import Path

import pytest
from support.model_shapes import MODELS

from quantcli.errors import PlanError, UsageError
from quantcli.plan.planner import Plan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_file import dump_recipe, load_recipe
from quantcli.plan.shipped_recipes import shipped_recipes

FOLDER = Path(__file__).parents[2] / "configs"
EXPECTED = {
    "experts3": ("mixtral-4", {
        "blk.0.ffn_down_exps.weight": "Q3_K",
        "blk.0.attn_v.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q6_K",
        "output.weight": "Q6_K",
    }),
    "q4_0-pure": ("llama-32-gqa", {
        "token_embd.weight": "Q4_0",
        "output.weight": "Q4_0",
        "blk.0.ffn_down.weight": "Q4_0",
    }),
    "q4_k_m-attention8": ("llama-32-gqa", {
        "blk.9.attn_q.weight": "Q8_0",
        "blk.9.attn_output.weight": "Q8_0",
        "blk.9.ffn_up.weight": "Q4_K",
    }),
    "q4_k_m-ends6": ("llama-32-gqa", {
        "blk.0.attn_q.weight": "Q6_K",
        "blk.1.ffn_up.weight": "Q4_K",
        "blk.30.ffn_up.weight": "Q4_K",
        "blk.31.attn_k.weight": "Q6_K",
        "output.weight": "Q8_0",
    }),
    "q4_k_m-ends6-32": ("llama-32-gqa", {
        "blk.0.attn_q.weight": "Q6_K",
        "blk.1.ffn_up.weight": "Q6_K",
        "blk.2.ffn_up.weight": "Q4_K",
        "blk.29.ffn_up.weight": "Q4_K",
        "blk.30.ffn_gate.weight": "Q6_K",
        "blk.31.attn_k.weight": "Q6_K",
    }),
    "q4_k_m-head8": ("llama-32-gqa", {
        "output.weight": "Q8_0",
        "token_embd.weight": "Q8_0",
        "blk.9.ffn_up.weight": "Q4_K",
    }),
    "q4_k_m-strict": ("llama-32-gqa", {"blk.9.ffn_up.weight": "Q4_K"}),
}  # fmt: skip


def plan(model_name: str, recipe: Recipe) -> Plan:
    model = MODELS[model_name]()
    return make_plan(model.output_tensors(), model.metadata(), recipe)


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_every_recipe_does_what_it_says(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe
    model_name, expected = EXPECTED[path.stem]
    found = plan(model_name, recipe)
    formats = {item.tensor.name: item.format for item in found.items}
    assert {name: formats[name] for name in expected} == expected
    assert not found.notes


def test_the_strict_recipe_stops() -> None:
    with pytest.raises(PlanError, match="cannot be Q4_K"):
        plan("llama-narrow", load_recipe(FOLDER / "q4_k_m-strict.toml"))


def test_the_ends_of_a_model_of_another_depth_are_warned_about() -> None:
    notes = plan("llama-12", load_recipe(FOLDER / "q4_k_m-ends6-32.toml")).notes
    assert len(notes) == 2
    assert all("has no effect" in note.message for note in notes)


def test_recipes_are_found_by_name() -> None:
    assert list(shipped_recipes()) == sorted(EXPECTED)
    assert load_recipe("q4_k_m-head8") == load_recipe(FOLDER / "q4_k_m-head8.toml")


def test_a_file_goes_before_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q4_k_m-head8").mkdir()
    with pytest.raises(UsageError, match="the folder records no recipe"):
        load_recipe("q4_k_m-head8")


def test_an_unknown_name_gets_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no recipe of that name") as caught:
        load_recipe("q4_k_m-heads8")
    assert caught.value.hint is not None
    assert "did you mean q4_k_m-head8" in caught.value.hint
    assert "experts3" in caught.value.hint
