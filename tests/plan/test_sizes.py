"""The size of a model in each file type against the plans for these types."""

import pytest
from support.model_shapes import MODELS

from quantcli.errors import PlanError
from quantcli.plan.filetypes import file_types
from quantcli.plan.planner import make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.sizes import size_table


@pytest.mark.parametrize("name", ["llama-12", "llama-narrow", "mixtral-8", "gemma2-26-tied"])
def test_sizes_are_those_of_the_plans(name: str) -> None:
    model = MODELS[name]()
    table = size_table(model.output_tensors(), model.metadata())
    listed = [line.name for line in table]
    assert listed == [each.name for each in file_types() if each.name in listed]
    for each in file_types():
        if each.name not in listed:
            with pytest.raises(PlanError, match="no format to fall back to"):
                make_plan(model.output_tensors(), model.metadata(), Recipe(type=each.name))
    for line in table:
        if line.needs_importance:
            continue
        plan = make_plan(model.output_tensors(), model.metadata(), Recipe(type=line.name))
        assert line.nbytes == plan.data_bytes
        assert line.bits_per_weight == pytest.approx(plan.bits_per_weight)


def test_types_that_need_an_importance_matrix_have_a_size_too() -> None:
    model = MODELS["llama-12"]()
    table = {line.name: line for line in size_table(model.output_tensors(), model.metadata())}
    assert table["Q2_K_S"].needs_importance
    assert table["Q2_K_S"].nbytes < table["Q2_K"].nbytes < table["F32"].nbytes
