"""Memory, disk and shards of a plan."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from support.model_shapes import MODELS, decoder

from quantcli.artifacts.shards import split_shards
from quantcli.errors import OutputError, UsageError
from quantcli.pieces import Add, Order, Piece
from quantcli.plan.budget import check_disk, free_disk, thread_memory
from quantcli.plan.planner import Plan, TensorPlan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.size_text import parse_size
from quantcli.types import OutputTensor

SLAB = 4 << 20


def plan_of(model_name: str = "llama-12", **recipe: object) -> Plan:
    model = MODELS[model_name]()
    return make_plan(model.output_tensors(), model.metadata(), Recipe(**recipe))


def plan_for(*tensors: OutputTensor) -> Plan:
    return make_plan(tensors, decoder("llama", 2).metadata(), Recipe())


def split(plan: Plan, limit: int) -> list[list[TensorPlan]]:
    return split_shards(plan.items, lambda item: plan.aligned(item.nbytes), limit)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2G", 2 * 10**9), ("500M", 5 * 10**8), ("1.5g", 15 * 10**8), ("300000", 300000),
     ("10 kB", 10**4), ("1T", 10**12)],
)  # fmt: skip
def test_sizes_are_decimal(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "2X", "G", "2Gi", "1e9", "0.0001"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("limit", ["100K", "300K", "1M", "1G"])
@pytest.mark.parametrize("type_name", ["Q4_K_M", "F16"])
def test_shards_are_those_of_ggufs_own_writer(limit: str, type_name: str, tmp_path: Path) -> None:
    plan = plan_of(type=type_name)
    writer = gguf.GGUFWriter(tmp_path / "x", "llama", split_max_size=parse_size(limit))
    for item in plan.items:
        writer.add_tensor_info(
            item.tensor.name, item.tensor.shape, np.dtype(np.float16), plan.aligned(item.nbytes)
        )
    expected = [list(shard) for shard in writer.tensors]
    shards = split(plan, parse_size(limit))
    assert [[item.tensor.name for item in shard] for shard in shards] == expected


def test_a_tensor_that_is_too_large_gets_its_own_shard() -> None:
    plan = plan_of()
    shards = split(plan, 1)
    assert [len(shard) for shard in shards] == [1] * len(plan.items)


def test_disk(tmp_path: Path) -> None:
    free = free_disk(tmp_path / "not" / "yet")
    assert free > 0
    check_disk(1, tmp_path / "not" / "yet")
    with pytest.raises(OutputError, match=r"1,000,000,000,000,000,000 bytes needed, [\d,]+ bytes"):
        check_disk(10**18, tmp_path)


def test_memory_does_not_grow_with_the_model() -> None:
    small = plan_for(OutputTensor("output.weight", (1 << 14, 4096), "BF16"))
    large = plan_for(OutputTensor("output.weight", (1 << 18, 4096), "BF16"))
    assert thread_memory(small, SLAB) == thread_memory(large, SLAB) < 200 << 20


def test_memory_grows_with_slabs() -> None:
    plan = plan_for(OutputTensor("output.weight", (1 << 16, 4096), "BF16"))
    assert thread_memory(plan, 2 * SLAB) > thread_memory(plan, SLAB) > SLAB


def test_memory_counts_what_is_held_at_once() -> None:
    def held(tensor: OutputTensor) -> int:
        return thread_memory(plan_for(tensor), SLAB)

    name, shape, rows = "output.weight", (1 << 16, 4096), 1 << 16
    plain = held(OutputTensor(name, shape, "BF16", (Piece("a", rows),)))
    stored, encoded = SLAB, SLAB // 2 * 210 // 256
    assert plain == stored + 4 * 4096 + encoded
    permuted = Piece("a", rows, order=Order((2, rows // 2, 4096), (1, 0, 2), 4096))
    assert held(OutputTensor(name, shape, "BF16", (permuted,))) == plain + 4 * SLAB
    shifted = Piece("a", rows, pointwise=Add(1.0))
    assert held(OutputTensor(name, shape, "BF16", (shifted,))) > plain + SLAB
    assert held(OutputTensor(name, shape, "F8_E4M3", (Piece("a", rows),))) > plain + SLAB
    wide = held(OutputTensor(name, (4, 1 << 24), "BF16", (Piece("a", 4),)))
    assert wide > 2 << 24, "a row is held whole"


def test_an_empty_plan_needs_only_the_interpreter() -> None:
    empty = Plan(Recipe(), 15, ())
    assert thread_memory(empty, SLAB) == 0
    assert empty.bits_per_weight == 0


def test_a_plans_items_know_their_type_ids() -> None:
    item = TensorPlan(OutputTensor("a", (1, 256), "F32"), "Q4_K", "", 144)
    assert item.type_id == int(gguf.GGMLQuantizationType.Q4_K)
