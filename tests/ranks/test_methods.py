"""A method run by ranks that torch.distributed joins: what each loses, what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file
from support.tiny_models import build
from support.writing_commands import TEXT

from quantcli.cli.app import run
from quantcli.errors import OutputError
from quantcli.layerwise.ranked_run import begin_folder
from quantcli.ranks.joined import set_active
from quantcli.run.ranked_rounding import Unit, cut_units, divide_units
from quantcli.types import OutputTensor

pytest.importorskip("torch")
pytest.importorskip("transformers")

GPTQ = ("--type", "Q4_0", "--method", "gptq", "--calibrate", str(TEXT), "--chunks", "9", "--json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return build("llama", folder, changes=sizes | {"num_hidden_layers": 4})


class Ranks:
    """Processes of one command."""

    def __init__(self, lines: Sequence[Sequence[object]], timeout: float = 60) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                  "WORLD_SIZE": str(len(lines)), "QUANTCLI_RANK_TIMEOUT": str(timeout)}  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "quantcli", *map(str, line), "--threads", "1"], text=True,
                env=os.environ | common | {"RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank, line in enumerate(lines)
        ]  # fmt: skip

    def end(self) -> list[tuple[int, str, str]]:
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=300)
            found.append((process.returncode, out, err))
        return found


@pytest.fixture
def alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """The document of one process."""
    assert run(["quantize", str(source), *GPTQ, "-o", str(tmp_path / "one.gguf")]) == 0
    return json.loads(capsys.readouterr().out)


def _losses(document: Any, key: str) -> float:
    return float(np.exp(np.mean([np.log(tensor[key]) for tensor in document["tensors"]])))


@pytest.mark.slow
def test_ranks_lose_what_one_process_loses_and_give_the_same_bytes_again(
    source: Path, tmp_path: Path, alone: Any
) -> None:
    made = []
    for name in ("a.gguf", "b.gguf"):
        line = ["quantize", source, *GPTQ, "-o", tmp_path / name]
        ended = Ranks([line, line]).end()
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert ended[1][1] == ""
        made.append(json.loads(ended[0][1]))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    names = [tensor["tensor"] for tensor in made[0]["tensors"]]
    assert sorted(names) == sorted(tensor["tensor"] for tensor in alone["tensors"])
    for key in ("loss_before", "loss_after"):
        assert _losses(made[0], key) == pytest.approx(_losses(alone, key), rel=0.005)
    assert made[0]["source_digest"] == alone["source_digest"]


@pytest.mark.slow
def test_all_that_a_method_does_is_divided(source: Path, tmp_path: Path) -> None:
    words = ["quantize", source, "--type", "Q4_0", "--method", "awq,gptq,tune", "--allocate"]
    words += ["--target-bpw", "6.5", "--tune", "e2e", "--tune-steps", "4", "--e2e-steps", "2"]
    words += ["--calibrate", TEXT, "--chunks", "5", "--fisher-windows", "4", "--json"]
    made = []
    for name, count in (("one.gguf", 1), ("a.gguf", 2), ("b.gguf", 2)):
        ended = Ranks([[*words, "-o", tmp_path / name]] * count).end()
        assert [code for code, _, _ in ended] == [0] * count, ended
        made.append(json.loads(ended[0][1]))
    alone, together, _ = made
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    types = [
        {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / name).tensors}
        for name in ("one.gguf", "a.gguf")
    ]
    assert types[0] == types[1]
    chosen = {kind.name for name, kind in types[0].items() if "attn_" in name}
    assert chosen == {"F32", "Q4_0", "Q8_0"}
    # Training draws other windows, so only what comes before it is alike.
    for key in ("loss_before", "loss_after"):
        assert _losses(together, key) == pytest.approx(_losses(alone, key), rel=0.005)
    gains = [document["end_to_end"] for document in (alone, together)]
    assert gains[0]["held_out_kld_before"] == pytest.approx(
        gains[1]["held_out_kld_before"], rel=0.02
    )


@pytest.mark.slow
def test_a_kill_costs_a_layer_and_another_number_of_ranks_goes_on(
    source: Path, tmp_path: Path, alone: Any
) -> None:
    out = tmp_path / "m.gguf"
    line = ["quantize", source, *GPTQ, "-o", out]
    ranks = Ranks([line, line])
    state = tmp_path / ".m.gguf.partial-run" / "state.json"
    while not state.exists() or json.loads(state.read_text())["done"] < 1:
        assert ranks.processes[1].poll() is None, ranks.end()
        time.sleep(0.01)
    ranks.processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    (code, _, said), _ = ranks.end()
    assert time.monotonic() - began < 30
    assert code == 1, said
    assert "another rank has ended" in said
    done = json.loads(state.read_text())["done"]
    assert done >= 1
    assert not out.exists()
    ended = Ranks([[*line, "--resume"]] * 3).end()
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert f"continuing after layer {done - 1}" in ended[0][2]
    document = json.loads(ended[0][1])
    assert _losses(document, "loss_after") == pytest.approx(_losses(alone, "loss_after"), rel=0.005)
    assert not state.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "sentence", "rank"),
    [
        (["--damping", "0.2"], "rank 1 and rank 0 differ in the method options", 1),
        (["--device", "cuda:9"], "torch finds no", 1),
    ],
)
def test_what_is_wrong_with_one_rank_is_said_by_it_and_the_others_end(
    more: list[str], sentence: str, rank: int, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    line = ["quantize", source, *[word for word in GPTQ if word != "--json"], "-o", out]
    ended = Ranks([line, [*line, *more]]).end()
    assert all(code in (1, 2) for code, _, _ in ended), ended
    said = [err for _, _, err in ended]
    assert sentence in said[rank]
    assert "rank 0 ends, since" in said[1 - rank]
    assert all(err.count("error: ") == 1 for err in said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "MASTER_ADDR and MASTER_PORT are not set"),
        (["--propagate"], "not --propagate"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    more: list[str], sentence: str, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    line = ["quantize", str(source), "--type", "Q4_0", "--calibrate", str(TEXT)]
    assert run([*line, "--method", "gptq", *more, "-o", str(tmp_path / "m.gguf")]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class _Second:
    """The second of two ranks, the first of which has just written into its folder."""

    index, count = 1, 2

    def gather(self, value: str) -> list[str]:
        return ["theirs", value]

    def wait(self) -> None:
        """The first has come as well."""


def test_a_folder_that_is_not_shared_is_said_by_the_rank_that_does_not_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = _Second()
    set_active(group)
    monkeypatch.setenv("QUANTCLI_RANK_TIMEOUT", "0.1")
    try:
        with pytest.raises(OutputError, match=r"rank 1 does not see in .* what rank 0 has written"):
            begin_folder(tmp_path / "run", empty=True)
        (tmp_path / "token-theirs").touch()
        begin_folder(tmp_path, empty=True)
    finally:
        set_active(None)
    # Neither made nor emptied by any but the first.
    assert [path.name for path in tmp_path.iterdir()] == ["token-theirs"]


def test_units_are_divided_by_what_they_cost() -> None:
    wide = Unit("down", 0, 0, 4096, 11008)
    units = [wide, *(Unit(name, 0, 0, 4096, 4096) for name in "qkvo")]
    homes = [("down", 0), ("q", 0), ("q", 0), ("q", 0), ("o", 0)]
    owners = divide_units(units, homes, 2)
    assert set(owners[1:]) == {1 - owners[0]}
    # Without a Hessian of its own each, three are as many as two can have evenly.
    alike = [Unit("x", i, 0, 64, 64) for i in range(9)]
    owners = divide_units(alike, [("x", i) for i in range(9)], 3)
    assert [owners.count(rank) for rank in range(3)] == [3, 3, 3]


class _Codec:
    def __init__(self, by_rows: bool) -> None:
        self.by_rows = by_rows


@pytest.mark.parametrize(
    ("shape", "by_rows", "by_strips", "count"),
    [
        ((11008, 64), True, True, 3),
        ((11008, 64), True, False, 4),
        ((300, 64), True, False, 1),
        ((11008, 64), False, False, 1),
        ((8, 512, 64), True, True, 8),
    ],
)
def test_a_tensor_is_cut_where_rows_know_nothing_of_one_another(
    shape: tuple[int, ...], by_rows: bool, by_strips: bool, count: int
) -> None:
    tensor = OutputTensor("t", shape, "F32")
    codecs: Any = [_Codec(by_rows)]
    units = cut_units(tensor, codecs, by_strips=by_strips, ranks=4)
    assert len(units) == count
    rows = shape[-2]
    covered = [unit.matrix * rows + row for unit in units for row in range(unit.start, unit.stop)]
    assert covered == list(range(tensor.rows))


@pytest.mark.slow
def test_a_calibration_and_an_evaluation_are_those_of_one_process(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["calibrate", source, "--data", TEXT, "--ctx", "64", "--chunks", "9"]
    line += ["--collect", "min_max,hessian"]
    assert run([*map(str, line), "-o", str(tmp_path / "one.gguf")]) == 0
    ended = Ranks([[*line, "-o", tmp_path / "two.gguf"]] * 2).end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    one, two = (
        {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / name).tensors}
        | load_file(tmp_path / name.replace(".gguf", ".stats.safetensors"))
        for name in ("one.gguf", "two.gguf")
    )
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-5, atol=1e-7)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    line = ["eval-ppl", source, "--data", TEXT, "--ctx", "64", "--chunks", "9", "--json"]
    capsys.readouterr()
    assert run([str(word) for word in line]) == 0
    alone = json.loads(capsys.readouterr().out)
    ended = Ranks([line, line]).end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    together = json.loads(ended[0][1])
    assert ended[1][1] == ""
    one_result, two_result = alone["results"][0], together["results"][0]
    for key in ("value", "error"):
        assert two_result["perplexity"][key] == pytest.approx(
            one_result["perplexity"][key], rel=1e-9
        )
    assert two_result["windows"] == one_result["windows"]
