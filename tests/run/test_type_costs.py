"""What types are said to cost, against the KL divergence that transformers then finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.events import drain
from quantcli.formats import get_format
from quantcli.layerwise.texts import Text
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.plan.type_choices import TYPES, find_type_choices
from quantcli.rounding.codecs import BlockCodec
from quantcli.rounding.options import Options
from quantcli.run.calibrated_run import CalibratedRun, plan_passes, prepare_run
from quantcli.run.type_costs import measure_type_costs
from quantcli.types import Event, Progress

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
TEXT = (Path(__file__).parents[1] / "golden" / "calibration.txt").read_text()
OPTIONS = Options(fisher_windows=24)


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with open_model(MINI) as model:
        yield model


@pytest.fixture(scope="module")
def job(mini: Model) -> CalibratedRun:
    return prepare_run(mini, [Text("a text", TEXT)], ctx=64, chunks=24, random_share=0)


@pytest.fixture(scope="module")
def costs(mini: Model, job: CalibratedRun, tmp_path_factory: pytest.TempPathFactory) -> dict:
    plan = prepare_gguf(
        mini, Recipe(type="Q4_K_S"), Path("m.gguf"), importance=job.importance, check=False
    ).plan
    run = plan_passes(job, tmp_path_factory.mktemp("survey"), "float32", "cpu", 1 << 40, 1)
    kinds = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q6_K")
    events: list[Event] = []
    candidates = {
        choice.name: {kind: BlockCodec(get_format(kind)) for kind in choice.sizes}
        for choice in find_type_choices(plan, kinds)
    }
    found = drain(measure_type_costs(run, candidates, OPTIONS), events.append)
    assert events
    # A second call for the same answers from what was kept.
    again = measure_type_costs(run, candidates, OPTIONS)
    assert drain(again, pytest.fail) == found
    other = replace(OPTIONS, damping=0.1)
    asked = measure_type_costs(run, candidates, other)
    assert isinstance(next(asked), Progress)
    asked.close()
    return dict(found)


def test_every_matrix_has_its_costs_and_more_bits_cost_less(costs: dict) -> None:
    assert len(costs) == 4 * 7 + 1
    for each in costs.values():
        assert each["Q2_K"] > each["Q3_K"] > each["Q4_K"] > each["Q6_K"] > 0
        assert each["Q3_K"] > each["IQ4_XS"]
    assert set(costs["token_embd.weight"]) <= set(TYPES)


def test_they_foretell_the_divergence(costs: dict, job: CalibratedRun) -> None:
    """Plain rounding of one matrix at a time costs more than what is said of feedback's rounding,
    and matrices for which more is said do cost more.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()
    ids = torch.from_numpy(job.windows.ids[::3].astype(np.int64))
    with torch.inference_mode():
        original = torch.log_softmax(model(ids).logits, -1)
    said, found = [], []
    weights = dict(model.named_parameters())
    for layer in range(4):
        for ours, theirs in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                             ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):  # fmt: skip
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            kept = weight.detach().clone()
            values = kept.numpy()
            kind = gguf.GGMLQuantizationType.Q4_0
            rounded = gguf.dequantize(gguf.quantize(values, kind), kind)
            with torch.inference_mode():
                weight.copy_(torch.from_numpy(rounded))
                now = torch.log_softmax(model(ids).logits, -1)
                weight.copy_(kept)
            found.append(float((original.exp() * (original - now)).sum(-1).mean()))
            said.append(costs[f"blk.{layer}.{ours}.weight"]["Q4_K"])
    order = [np.argsort(np.argsort(values)) for values in (said, found)]
    assert np.corrcoef(*order)[0, 1] > 0.7
    assert (np.array(found) > np.array(said)).all()


def test_sizes_are_those_of_the_formats() -> None:
    assert [get_format(kind).bits for kind in TYPES] == sorted(get_format(k).bits for k in TYPES)
