"""``quantcli inspect``, as it is typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf import GGUFReader
from support.broken import legacy, legacy_entry
from support.fake_hub import serve
from support.gguf_files import write_imatrix, write_model
from support.process import command, environment, run

from quantcli.cli.app import run as run_here


@pytest.fixture
def inspect(capsys):
    """``inspect(args...)`` in this process: what it writes to standard output."""

    def call(*args: object, code: int = 0) -> str:
        found = run_here(["inspect", *map(str, args)])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.out if code == 0 else captured.err

    return call


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


@pytest.fixture
def imatrix(tmp_path):
    sums = np.arange(1, 17, dtype=np.float32).reshape(2, 8)
    entry = (sums, np.array([[4], [0]], np.float32))
    names = ("blk.0.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight")
    return write_imatrix(tmp_path / "i.gguf", dict.fromkeys(names, entry))


def test_the_overview(inspect, mini):
    text = inspect(mini)
    for part in (
        "Architecture  llama (LlamaForCausalLM)",
        "Parameters    4.20M (1.05M in the embedding, also the output head)",
    ):
        assert part in text
    assert ["Q4_K_M", "4"] in [line.split()[:2] for line in text.splitlines()]
    assert "model.layers" not in text
    assert "Q4_K_S" not in text


def test_the_overview_is_no_longer_than_a_terminal(inspect, mini, model):
    for target in (mini, model):
        lines = inspect(target).splitlines()
        assert len(lines) <= 23
        assert max(map(len, lines[1:])) <= 80


def test_the_whole_overview(inspect, mini, model):
    text = inspect(mini, "-v")
    assert "16.8 MB   8.39 MB  4.20 MB  2.10 MB  1.57 MB  1.05 MB" in text
    usual = {line.split()[0] for line in text.splitlines() if "\u2022" in line.split()}
    assert usual >= {"Q8_0", "Q4_K_M", "Q2_K"}
    assert "Q4_K_S" in text
    assert "[t0, t1, t2, t3, t4, t5, ... 1,000 in all]" in inspect(model, "-v")


def test_the_overview_is_drawn_within_the_terminal(mini):
    env = {"FORCE_COLOR": "1", "COLUMNS": "72"}
    done = run("inspect", mini, env=env)
    plain = run("inspect", mini, env=env | {"NO_COLOR": "1"})
    assert "\x1b[" in done.stdout
    assert max(map(len, plain.stdout.splitlines())) <= 72


def test_headers_are_enough(mini, tmp_path):
    """The bytes of the weights are never asked for: a hole of 40 GB takes their place."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(mini / name)
    size = 20_000_000_000
    entry = {"dtype": "BF16", "shape": [size // 1000, 1000], "data_offsets": [0, 2 * size]}
    header = json.dumps({"w": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * size)
    done = run("inspect", tmp_path)
    assert done.returncode == 0
    assert "Parameters    20.0B" in done.stdout
    assert "80.0 GB" in done.stdout


def test_the_tensor_table(inspect, mini):
    lines = inspect(mini, "--tensors").splitlines()
    assert lines[1].split() == ["Tensor", "In", "GGUF", "Shape", "Type", "Size", "Bits"]
    assert len([line for line in lines if "BF16" in line]) == 38


def test_filter_and_sort(inspect, mini):
    text = inspect(mini, "--filter", r"mlp\.(up|down)", "--sort", "name")
    names = [line.split()[0] for line in text.splitlines() if "BF16" in line]
    assert len(names) == 8
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--filter", "("], "is not a regular expression"),
        (["--filter", "xyz"], "is found in no tensor's name"),
        (["--sort", "sise"], "did you mean size?"),
        (["--sort", "kurtosis"], "add --stats"),
        (["--kv"], "--kv shows the key-values of a GGUF, and this is a checkpoint"),
    ],
)
def test_wrong_usage(inspect, mini, args, message):
    assert message in inspect(mini, *args, code=2)


def test_everything_as_json(inspect, mini):
    found = json.loads(inspect(mini, "--json"))
    assert found["schema"] == "quantcli.inspect/1"
    assert found["kind"] == "checkpoint"
    assert found["parameters"]["total"] == 4_196_608
    assert len(found["tensors"]) == 38
    assert {row["type"] for row in found["quantized"]} >= {"Q4_K_M", "Q8_0"}
    assert "stats" not in found


def test_json_before_the_command_is_the_same(mini):
    assert json.loads(run("--json", "inspect", mini).stdout)["kind"] == "checkpoint"


def test_the_type_for_a_machine(inspect, mini):
    lines = inspect(mini, "--fit", "2G", "--ctx", "1k", "--kv", "q8_0").splitlines()
    assert lines[1].startswith("Take Q8_0: it fits, and its answers can hardly be told")
    assert "Run it with: llama-cli -m FILE -c 1024 -ctk q8_0 -ctv q8_0" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("--type"))
    assert lines[header + 1].split()[0] == "Q8_0"
    assert "IQ4_NL" not in "".join(lines)
    assert "IQ4_NL" in inspect(mini, "--fit", "2G", "-v")
    assert max(map(len, lines[2:])) <= 80


def test_the_type_for_a_machine_as_json(inspect, mini):
    text = inspect(mini, "--fit", "2G", "--ctx", "1k", "--on", "mac", "--json")
    found = json.loads(text)["fit"]
    assert found["machine"]["usable_bytes"] == 2**31 - 2**31 // 3 - 2**29
    assert (found["recommended"], found["context"], found["cache_type"]) == ("Q8_0", 1024, "F16")
    assert found["why"].startswith("Take Q8_0")
    sizes = {row["type"]: row["bytes"] for row in json.loads(text)["quantized"]}
    for row in found["types"]:
        assert row["weights_bytes"] == pytest.approx(sizes[row["type"]], abs=38 * 32)
        # Keys and values of 4 layers, 2 heads of 64 numbers in 2 bytes, for 1,024 tokens.
        assert row["cache_bytes"] == 2 * 4 * 2 * 64 * 2 * 1024
        assert (
            row["total_bytes"]
            == row["device_bytes"]
            == sum(row[f"{part}_bytes"] for part in ("weights", "cache", "compute"))
        )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fit", "lots"], "'lots' is no size of a memory"),
        (["--fit", "8G", "--on", "tpu"], "there is no machine 'tpu' to fit"),
        (["--fit", "8G", "--ctx", "long"], "'long' is no number of tokens"),
        (["--fit", "8G", "--kv-type", "q9_0"], "there is no KV cache of type q9_0"),
        (["--ctx", "8k"], "--ctx belongs to --fit"),
        (["--no-flash-attn"], "--no-flash-attn belongs to --fit"),
    ],
)
def test_what_is_wrong_with_a_machine(inspect, mini, args, message):
    assert message in inspect(mini, *args, code=2)


def test_no_machine_for_what_is_no_text_model(inspect, imatrix, tmp_path, mini):
    assert "--fit does not apply" in inspect(imatrix, "--fit", "8G", code=2)
    for path in mini.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLN"]}')
    assert "is of an architecture that quantcli does not know" in inspect(
        tmp_path, "--fit", "8G", code=1
    )


def test_statistics_of_the_weights(inspect, mini):
    import ml_dtypes  # noqa: F401 - gives NumPy the bfloat16 of the file
    from safetensors.numpy import load_file

    text = inspect(mini, "--stats", "--filter", "mlp", "--json", "--top", "2", "--threads", "2")
    stats = {row["name"]: row for row in json.loads(text)["stats"]}
    assert len(stats) == 12
    weights = load_file(mini / "model.safetensors")
    array = weights["model.layers.3.mlp.down_proj.weight"].astype(np.float64)
    found = stats["blk.3.ffn_down.weight"]
    assert found["std"] == pytest.approx(array.std(), rel=1e-9)
    assert found["mean"] == pytest.approx(array.mean(), abs=1e-12)
    assert (found["min"], found["max"]) == (array.min(), array.max())
    kurtosis = ((array - array.mean()) ** 4).mean() / array.var() ** 2
    assert found["kurtosis"] == pytest.approx(kurtosis, rel=1e-9)
    rms = np.sqrt((array**2).mean(axis=1, keepdims=True))
    assert found["outliers"]["count"] == int((np.abs(array) > 6 * rms).sum())
    peaks = np.abs(array).max(axis=0)
    assert [row["index"] for row in found["channels"]["top"]] == np.argsort(-peaks)[:2].tolist()
    assert found["channels"]["top"][0]["ratio"] == pytest.approx(peaks.max() / np.median(peaks))


def test_statistics_of_a_quantized_model(inspect, tmp_path):
    decoded = write_model(tmp_path / "m.gguf")
    found = json.loads(inspect(tmp_path / "m.gguf", "--stats", "--json"))
    assert len(found["stats"]) == len(decoded)
    for row in found["stats"]:
        values = decoded[row["name"]].astype(np.float64)
        assert row["std"] == pytest.approx(values.std(), rel=1e-5), row["name"]
        assert row["max"] == pytest.approx(values.max(), rel=1e-5)


def test_the_table_of_statistics_is_sorted(inspect, mini):
    text = inspect(mini, "--stats", "--sort", "kurtosis", "--filter", "blk.3")
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Tensor"))
    kurtosis = [float(line.split()[5]) for line in lines[start + 1 : start + 10]]
    assert kurtosis == sorted(kurtosis, reverse=True)
    assert "Channels that stand out" in text


def test_broken_numbers_are_told(inspect, tmp_path, mini, capsys):
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    array = np.ones((4, 64), np.float32)
    array[2, 3], array[1, 1] = np.nan, np.inf
    save_file({"w": array}, tmp_path / "model.safetensors")
    assert run_here(["inspect", str(tmp_path), "--stats"]) == 0
    found = capsys.readouterr()
    assert found.err.endswith(
        "\nwarning: NaN or infinities in 1 of 1 tensors are left out of the numbers: w\n"
    )
    assert "Not finite" in found.out
    row = json.loads(inspect(tmp_path, "--stats", "--json"))["stats"][0]
    assert (row["nonfinite"], row["weights"]) == (2, 256)


def test_a_model_nobody_knows_is_listed_with_a_note(tmp_path, mini):
    for path in mini.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLN"]}')
    done = run("inspect", tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: there is no table for LlamaForCausalLN: its linear")
    assert "Parameters    4.20M" in done.stdout


def test_a_gguf(inspect, model):
    text = inspect(model)
    assert "Stored as     Q4_K_M, 6 tensors" in text
    assert "Made by       quantcli 9.8.7 from org/name@abc123" in text
    assert "IQ4_XS" in text
    assert "Key-values" in text
    assert "t999" in inspect(model, "--kv")
    assert "bits_per_weight" in inspect(model, "--json")


def test_an_importance_matrix(inspect, imatrix):
    text = inspect(imatrix)
    assert "Collected on       40 chunks of 512 tokens" in text
    assert "Unseen matrices    2" in text
    found = json.loads(inspect(imatrix, "--json", "--filter", "blk.1"))
    assert (found["kind"], len(found["entries"])) == ("imatrix", 1)
    assert found["entries"][0]["unseen_matrices"] == 1
    assert "--stats does not apply to an importance matrix" in inspect(imatrix, "--stats", code=2)
    assert "found in no entry" in inspect(imatrix, "--filter", "xyz", code=2)


def test_a_legacy_importance_matrix(inspect, tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(legacy_entry(b"blk.0.attn_q.weight", [0.0, 2.0])))
    assert "legacy .dat form" in inspect(path)


def test_what_is_not_there_is_said(inspect, tmp_path):
    text = inspect(tmp_path / "nothing", code=1)
    assert text.startswith(f"error: {tmp_path / 'nothing'}: there is no such file or folder")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M", "Q3_K_S", "Q5_1", "F32"])
def test_the_sizes_are_those_of_the_files_that_quantize_makes(name, inspect, mini, tmp_path):
    told = {row["type"]: row for row in json.loads(inspect(mini, "--json"))["quantized"]}
    made = tmp_path / "m.gguf"
    assert run_here(["quantize", str(mini), "--type", name, "-o", str(made), "-q"]) == 0
    tensors = [(int(t.n_bytes), int(t.n_elements)) for t in GGUFReader(made).tensors]
    assert told[name]["bytes"] == sum(-(-nbytes // 32) * 32 for nbytes, _ in tensors)
    bits = 8 * sum(nbytes for nbytes, _ in tensors) / sum(count for _, count in tensors)
    assert told[name]["bits_per_weight"] == pytest.approx(bits, rel=1e-12)


def test_into_head_under_pipefail(mini):
    program = f"'{sys.executable}' -m quantcli inspect '{mini}' --tensors"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} | head -n 2"],
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("Tensor")


def test_nothing_but_headers_needs_no_heavy_library(mini):
    code = (
        "import sys\n"
        "from quantcli.cli.app import run\n"
        f"run(['inspect', {str(mini)!r}, '--json'])\n"
        "heavy = ('torch', 'transformers', 'tokenizers', 'huggingface_hub', 'gguf')\n"
        "sys.exit(','.join(name for name in heavy if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "\n", done.stderr


@pytest.fixture
def on_the_hub(mini, tmp_path):
    """A Hub that holds the small model, and the environment that leads there."""
    with serve({"org/mini": {path.name: path.read_bytes() for path in mini.iterdir()}}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
        yield hub, env | {"HF_HUB_OFFLINE": "0"}


def test_a_model_on_the_hub_is_seen_without_its_weights(on_the_hub, mini):
    hub, env = on_the_hub
    remote, local = run("inspect", "org/mini", env=env), run("inspect", mini)
    assert remote.returncode == 0, remote.stderr
    assert remote.stdout.splitlines()[1:] == local.stdout.splitlines()[1:]
    assert "the weights stay there" in remote.stderr
    assert "model.safetensors" not in hub.downloaded()


def test_a_model_on_the_hub_is_fitted_without_its_weights(on_the_hub, mini):
    hub, env = on_the_hub
    remote = run("inspect", "org/mini", "--fit", "2G", env=env)
    assert remote.returncode == 0, remote.stderr
    assert (
        remote.stdout.splitlines()[1:]
        == run("inspect", mini, "--fit", "2G").stdout.splitlines()[1:]
    )
    assert "model.safetensors" not in hub.downloaded()


def test_statistics_of_a_model_on_the_hub_read_it_where_it_is(on_the_hub):
    hub, env = on_the_hub
    done = run("-q", "inspect", "org/mini", "--stats", "--filter", "attn_v", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "blk.3.attn_v.weight" in done.stdout
    assert "model.safetensors" not in hub.downloaded()


def test_an_interrupted_download_is_not_waited_for(on_the_hub):
    """Not even where the server has stopped talking in the middle of a file."""
    hub, env = on_the_hub
    hub.stalls = "model.safetensors"
    process = subprocess.Popen(
        [*command(), "-q", "inspect", "org/mini", "--stats"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**env),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while "STALLS model.safetensors" not in hub.asked:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    taken = time.monotonic() - begun
    hub.released.set()
    assert (process.returncode, talk) == (130, "error: interrupted\n")
    assert taken < 5
