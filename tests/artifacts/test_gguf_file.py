"""The main job on a real model, against the real llama.cpp."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from quantcli import quantize
from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import peak_memory, threads_within, write_artifact
from quantcli.errors import OutputError, PlanError, WeightError
from quantcli.formats.container import padded
from quantcli.model import open_model
from quantcli.plan.recipe import Recipe

pytestmark = pytest.mark.slow

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bookworm-mini as a BF16 GGUF."""
    path = tmp_path_factory.mktemp("plain") / "mini-bf16.gguf"
    quantize(MINI, path, type="BF16")
    return path


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """An importance matrix of made-up numbers for every matrix of bookworm-mini, in .dat form."""
    rng = np.random.default_rng(7)
    path = tmp_path_factory.mktemp("imatrix") / "mini.dat"
    entries = [
        t for t in GGUFReader(plain).tensors if t.name.startswith("blk.") and t.n_elements > 5000
    ]
    with path.open("wb") as file:
        file.write(np.int32(len(entries)).tobytes())
        for tensor in entries:
            name = tensor.name.encode()
            values = rng.lognormal(sigma=2, size=int(tensor.shape[0])).astype(np.float32)
            file.write(np.int32(len(name)).tobytes() + name)
            file.write(np.int32(1).tobytes() + np.int32(len(values)).tobytes() + values.tobytes())
        file.write(np.int32(3).tobytes() + np.int32(1).tobytes() + b"x")
    return path


@pytest.mark.parametrize(
    ("type_name", "weighted"),
    [
        *product(["Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "Q3_K_L", "Q5_K_S", "Q6_K"], [False, True]),
        ("IQ2_XS", True),
        ("IQ1_M", True),
    ],
)
def test_whole_model_has_llama_cpps_bytes(
    tmp_path: Path, plain: Path, imatrix: Path, type_name: str, weighted: bool
) -> None:
    """One pass from the checkpoint gives what llama.cpp makes from the 16-bit GGUF."""
    oracle = pytest.importorskip("support.llama_quantize")
    theirs = tmp_path / "theirs.gguf"
    oracle.llama_quantize(plain, theirs, type_name, imatrix=imatrix if weighted else None)
    ours = tmp_path / "ours.gguf"
    quantize(MINI, ours, type=type_name, imatrix=str(imatrix) if weighted else None)
    mine, reference = tensors(ours), tensors(theirs)
    assert list(mine) == list(reference)
    assert {n: t for n, (t, _) in mine.items()} == {n: t for n, (t, _) in reference.items()}
    assert [n for n in mine if mine[n] != reference[n]] == []


@pytest.mark.parametrize("type_name", ["Q4_K_M", "BF16"])
def test_same_bytes_for_any_number_of_threads_and_from_either_source(
    tmp_path: Path, plain: Path, type_name: str
) -> None:
    sums = set()
    for threads in (1, 2, 5):
        path = tmp_path / f"{threads}.gguf"
        quantize(MINI, path, type=type_name, threads=threads)
        sums.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(sums) == 1
    again = tmp_path / "from-gguf.gguf"
    quantize(plain, again, type=type_name)
    assert tensors(again) == tensors(tmp_path / "1.gguf")


def test_shards_hold_the_same_tensors_and_load_as_one(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    quantize(MINI, whole, type="Q8_0")
    done = quantize(MINI, tmp_path / "parts.gguf", type="Q8_0", split_max_size="1M")
    assert len(done.paths) > 2
    assert done.paths[0].name == f"parts-00001-of-{len(done.paths):05d}.gguf"
    merged: dict[str, tuple[str, bytes]] = {}
    for path in done.paths:
        merged |= tensors(path)
    assert merged == tensors(whole)
    with open_model(done.paths[0]) as model:
        assert {t.name for t in model.tensors} == set(merged)
    llama_cpp = pytest.importorskip("llama_cpp")
    texts = [
        llama_cpp.Llama(str(path), n_ctx=64, verbose=False, n_threads=2)(
            "It was a", max_tokens=8, temperature=0
        )["choices"][0]["text"]
        for path in (whole, done.paths[0])
    ]
    assert texts[0] == texts[1]


def test_key_values_say_where_the_file_came_from(tmp_path: Path) -> None:
    quantize(MINI, tmp_path / "m.gguf", type="Q4_K_M", override_kv=["general.name=str:Mini"])
    reader = GGUFReader(tmp_path / "m.gguf")
    value = lambda key: reader.get_field(key).contents()  # noqa: E731
    assert value("general.file_type") == 15
    assert value("general.quantization_version") == 2
    assert value("general.architecture") == "llama"
    assert value("general.name") == "Mini"
    assert 'type = "Q4_K_M"' in value("quantcli.recipe")
    assert value("quantcli.source.digest").startswith("sha256:")
    assert "0" * 64 not in value("quantcli.source.digest")
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
    last = max(reader.tensors, key=lambda t: t.data_offset)
    assert (tmp_path / "m.gguf").stat().st_size == padded(int(last.data_offset + last.n_bytes), 32)


def test_memory_limit_takes_threads_away_and_then_refuses() -> None:
    with open_model(MINI) as model:
        job = prepare_gguf(model, Recipe(type="Q4_K_M"), Path("x.gguf"), check=False)
        free = peak_memory(job, 8)
        assert threads_within(job, 8, None) == 8
        assert threads_within(job, 8, free) == 8
        assert threads_within(job, 8, free - 1) == 7
        with pytest.raises(PlanError, match=r"even on one thread.*--max-memory"):
            threads_within(job, 8, 1000)


def test_digest_depends_on_the_weights_alone(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MINI, copy)
    first = quantize(MINI, tmp_path / "a.gguf", type="Q4_K_M").source_digest
    assert quantize(copy, tmp_path / "b.gguf", type="Q8_0", threads=1).source_digest == first
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    assert quantize(copy, tmp_path / "c.gguf", type="Q4_K_M").source_digest != first


def broken_copy(folder: Path, name: str, row: int, column: int, value: float) -> Path:
    import ml_dtypes  # noqa: F401

    shutil.copytree(MINI, folder)
    arrays = load_file(MINI / "model.safetensors")
    arrays[name] = arrays[name].copy()
    arrays[name][row, column] = value
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("type_name", ["Q4_K_M", "BF16", "F16", "Q8_0"])
@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, value: float, type_name: str, projection: str
) -> None:
    name = f"model.layers.2.self_attn.{projection}.weight"
    folder = broken_copy(tmp_path / "m", name, 70, 13, value)
    with pytest.raises(WeightError) as raised:
        quantize(folder, tmp_path / "o.gguf", type=type_name)
    assert name in str(raised.value)
    assert "row 70, column 13" in str(raised.value)
    assert "model.safetensors" in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_weight_too_large_for_a_half_scale_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = broken_copy(tmp_path / "m", name, 5, 40, 3e38)
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight.* at row 5"):
        quantize(folder, tmp_path / "o.gguf", type="Q8_0")


def test_existing_output_survives_a_failure(tmp_path: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    folder = broken_copy(tmp_path / "m", name, 0, 0, float("nan"))
    old = tmp_path / "o.gguf"
    old.write_bytes(b"precious")
    with open_model(folder) as model:
        with pytest.raises(OutputError, match="exists already"):
            prepare_gguf(model, Recipe(type="Q4_K_M"), old)
        job = prepare_gguf(model, Recipe(type="Q4_K_M"), old, force=True)
        with pytest.raises(WeightError):
            list(write_artifact(job))
    assert old.read_bytes() == b"precious"


def test_closing_the_iteration_early_leaves_nothing(tmp_path: Path) -> None:
    with open_model(MINI) as model:
        events = write_artifact(prepare_gguf(model, Recipe(type="Q4_K_M"), tmp_path / "o.gguf"))
        next(events)
        events.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_at_any_instant_leaves_a_whole_file_or_none(tmp_path: Path, number: int) -> None:
    rng = random.Random(int(number))
    target = tmp_path / "o.gguf"
    command = [sys.executable, "-m", "quantcli", "quantize", str(MINI), "--type", "Q2_K"]
    command += ["-o", str(target), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(target)
    assert list(tmp_path.iterdir()) == [target]
    whole = target.read_bytes()
    target.unlink()
    outcomes = set()
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            time.sleep(rng.uniform(0.05, 1.2))
            run.send_signal(number)
        outcomes.add(run.returncode)
        # The process may be killed after the file got its name and before it ends.
        if target.exists():
            assert target.read_bytes() == whole
            target.unlink()
        if number != signal.SIGKILL:
            assert list(tmp_path.iterdir()) == []
    assert outcomes <= {0, 130, -number}
    subprocess.run(command, capture_output=True, check=True)
    assert list(tmp_path.iterdir()) == [target]


def test_q8_0_source_gives_llama_cpps_bytes(tmp_path: Path, plain: Path) -> None:
    q8 = tmp_path / "q8.gguf"
    quantize(plain, q8, type="Q8_0")
    quantize(q8, tmp_path / "q4.gguf", type="Q4_0")
    oracle = pytest.importorskip("support.llama_quantize")
    theirs = tmp_path / "theirs.gguf"
    oracle.llama_quantize(q8, theirs, "Q4_0", allow_requantize=True)
    assert tensors(tmp_path / "q4.gguf") == tensors(theirs)
