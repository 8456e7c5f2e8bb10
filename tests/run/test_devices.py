"""Devices: which there are, what is refused, and that nothing of two devices meets on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from support.stand_in import MixedDevicesError, stand_in
from support.tiny_models import build

import quantcli
from quantcli.errors import DeviceError, UsageError
from quantcli.layerwise import devices
from quantcli.layerwise.devices import choose_device, device_errors, factoring, remark, widest
from quantcli.statistics.device_sums import DeviceSums

CPU = torch.device("cpu")
TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"


@pytest.mark.parametrize(
    ("found", "asked", "chosen"),
    [
        ({}, None, "cpu"),
        ({"cuda": 2}, None, "cuda"),
        ({"cuda": 2}, "auto", "cuda"),
        ({"xpu": 1, "mps": 1}, "auto", "xpu"),
        # Nobody has run it there, so it is taken only by name.
        ({"mps": 1}, "auto", "cpu"),
        ({"mps": 1}, "mps", "mps"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, "cpu", "cpu"),
    ],
)
def test_a_device_is_the_one_that_is_asked_for_or_the_best(
    found: dict[str, int], asked: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_count", lambda kind: found.get(kind, 0))
    assert choose_device(asked) == chosen


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tpu", "no device 'tpu' .auto, cpu, cuda, xpu or mps"),
        ("cuda:x", "'x' is no number of a cuda device"),
        ("cuda:2", "no device cuda:2 here .the last is cuda:1"),
        ("mps", "no MPS device here .--device cpu"),
        ("cpu:1", "no device 'cpu:1'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    asked: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_count", lambda kind: 2 if kind == "cuda" else 0)
    with pytest.raises(UsageError, match=message):
        choose_device(asked)


def test_plain_encoding_refuses_a_device_before_the_work(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing would run on cuda"):
        quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_0", device="cuda")
    with pytest.raises(UsageError, match="no device 'gpu'"):
        quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_0", method="gptq", device="gpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough mem"),
        (RuntimeError("MPS backend out of memory"), "not enough memory"),
        (NotImplementedError("The operator 'aten::x' is not implemented"), "cannot do this on mps"),
    ],
)
def test_what_a_device_cannot_do_is_one_sentence(failure: Exception, message: str) -> None:
    with pytest.raises(DeviceError, match=message), device_errors("mps"):
        raise failure
    with pytest.raises(type(failure)), device_errors("cpu"):
        raise failure


def test_what_a_device_lacks_is_said() -> None:
    assert "no float64" in str(remark("mps"))
    assert remark("cpu:torch") is None
    assert widest(torch.device("mps")) == torch.float32
    assert factoring(torch.device("mps")).type == "cpu"
    assert widest(CPU) == torch.float64
    assert factoring(CPU) == CPU


def test_an_error_of_ours_passes_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="no longer shares"), device_errors("cuda"):
        raise RuntimeError("x no longer shares its input")


@pytest.mark.parametrize("hold", [False, True])
def test_sums_that_are_held_are_those_of_the_host(hold: bool) -> None:
    draw = np.random.default_rng(1)
    sums, found = DeviceSums(hold=hold), np.ones((2, 6, 6))
    first, second = (draw.standard_normal((5, n)).astype(np.float32) for n in (6, 3))
    sums.add(found[1], torch.from_numpy(first))
    sums.add(found[1], torch.from_numpy(second), slice(2, 5))
    assert (found == 1).all() == hold
    sums.leave()
    want = np.ones((2, 6, 6))
    want[1] += first.T.astype(float) @ first
    want[1, 2:5, 2:5] += second.T.astype(float) @ second
    np.testing.assert_allclose(found, want, rtol=1e-6)
    sums.leave()
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_sums_make_room_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no memory for a second sum the first leaves the device, and comes back later."""
    found, free = np.zeros((2, 4, 4)), 1
    zeros, sums = torch.zeros, DeviceSums(hold=True)

    def make(*args: object, **options: object) -> object:
        nonlocal free
        if sums._held:
            raise torch.OutOfMemoryError("out of memory")
        free += 1
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", make)
    for number in (0, 1, 0):
        sums.add(found[number], torch.ones((3, 4)))
    sums.leave()
    assert free == 4
    assert (found == np.array([6, 3])[:, None, None]).all()


def test_the_stand_in_tells_when_two_devices_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = torch.empty(2, 2, device="meta"), torch.ones(2, 2)
    with stand_in(monkeypatch) as mode:
        assert (there @ there).cpu().shape == (2, 2)
        assert mode.operations == 1
        with pytest.raises(MixedDevicesError, match=r"mm.* of .*meta.*cpu"):
            there @ here


METHODS = {
    "gptq": {"type": "Q4_0", "method": "gptq"},
    "sorted": {"type": "Q5_1", "method": "gptq", "column_order": "activation", "fisher_windows": 0},
    "propagate": {"type": "IQ4_NL", "method": "gptq", "propagate": True, "fisher_windows": 0},
    "tune": {"type": "Q4_0", "method": "tune", "tune_steps": 2},
    "e2e": {"type": "Q4_0", "method": "tune", "tune": "e2e", "tune_steps": 1, "e2e_steps": 1},
    "awq": {"type": "Q4_0", "method": "awq,gptq", "fisher_windows": 0},
    "rotate": {"type": "Q4_0", "method": "rotate"},
    "smoothquant": {"to": "compressed-tensors", "scheme": "W8A8", "method": "smoothquant"},
    "allocate": {"method": "gptq", "target_bpw": 6.0, "allocate_from": "q4_0,q8_0"},
    "folder": {"to": "gptq", "method": "gptq", "group_size": 32, "fisher_windows": 0},
    "floats": {
        "to": "compressed-tensors",
        "scheme": "FP8_DYNAMIC",
        "method": "gptq",
        "fisher_windows": 0,
    },
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer of 32 columns: on the stand-in an operation takes as long as any."""
    changes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    return build("llama", tmp_path_factory.mktemp("narrow"), changes=changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_method_mixes_devices(
    name: str, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(monkeypatch) as mode:
        try:
            quantcli.quantize(
                narrow, tmp_path / "out", calibrate=TEXT, chunks=4, device="meta", threads=1,
                **METHODS[name],
            )  # fmt: skip
        except Exception as error:
            chain = error
            while chain is not None:
                assert not isinstance(chain, MixedDevicesError), chain
                chain = chain.__cause__ or chain.__context__
            raise
    assert mode.operations > 100


@pytest.mark.slow
def test_neither_evaluation_nor_calibration_mixes_devices(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(monkeypatch) as mode:
        quantcli.evaluate(narrow, TEXT, engine="torch", device="meta", ctx=32, chunks=2)
        evaluated = mode.operations
        done = quantcli.calibrate(
            narrow, TEXT, output=tmp_path / "m.gguf", device="meta", ctx=32, chunks=2,
            collect="hessian,abs_max,mean_abs,min_max,kv_max",
        )  # fmt: skip
    assert evaluated > 50
    assert mode.operations > evaluated + 50
    assert len(done.paths) == 2


@pytest.mark.slow
@pytest.mark.parametrize("to", [{"type": "Q4_0"}, {"to": "gptq", "group_size": 32}])
def test_torch_on_the_cpu_rounds_a_model_as_well_as_the_native_back_end(
    to: dict[str, object], narrow: Path, tmp_path: Path
) -> None:
    """Each tensor's loss on held-out text, which a tie hardly moves."""
    found = []
    for device in ("cpu", "cpu:torch"):
        done = quantcli.quantize(
            narrow, tmp_path / device, method="gptq", calibrate=TEXT, chunks=9, device=device,
            threads=1, **to,
        )  # fmt: skip
        found.append(done.document["tensors"])
    assert len(found[0]) >= 4
    for native, torches in zip(*found, strict=True):
        assert native["tensor"] == torches["tensor"]
        assert torches["loss_before"] == pytest.approx(native["loss_before"], rel=1e-3)
        assert torches["loss_after"] == pytest.approx(native["loss_after"], rel=0.05)
