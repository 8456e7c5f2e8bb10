"""lm-eval's tasks on our engines: the same figures as its own runner of transformers gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from quantcli.cli.app import run as run_here
from quantcli.evals.artifacts import open_artifact
from quantcli.evals.tasks import score, score_rolling

needs_harness = pytest.mark.skipif(not find_spec("lm_eval"), reason="needs lm_eval")
QUESTIONS = [
    ("It is a truth universally", [" acknowledged", " banana", " seven"], 0),
    ("He walked slowly to the", [" door", " the", " of"], 0),
    ("She looked at him and", [" said", " which", " a"], 0),
    ("The old man sat by the", [" fire", " is", " would be of the"], 0),
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: {metric}
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    # The harness itself puts a space between.
    lines = [
        {"question": q, "choices": [each.strip() for each in c], "gold": g} for q, c, g in QUESTIONS
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "novels.yaml"
    path.write_text(
        YAML.format(name="novels", data=data, kind="multiple_choice", target="gold", metric="acc")
    )
    return path


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_likelihoods_are_those_of_transformers(
    engine: str, mini: Path, gguf: Callable[[str], Path]
) -> None:
    """Log-probabilities from transformers' own model and tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if engine == "llama.cpp":
        pytest.importorskip("llama_cpp")
    model = transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(mini)
    opened = open_artifact(str(mini if engine == "torch" else gguf("F32")), engine=engine)
    with opened.model:
        loaded = opened.load(64, 1)
        begin = [] if loaded.begin is None else [loaded.begin]
        for before, choices, _ in QUESTIONS:
            for text in choices:
                ids = begin + words(before + text, add_special_tokens=False).input_ids
                known = len(begin) + len(words(before, add_special_tokens=False).input_ids)
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                wanted = [float(logits[n - 1, ids[n]]) for n in range(known, len(ids))]
                found, greedy = score(loaded, before, text, 64)
                assert found == pytest.approx(sum(wanted), abs=0.05 * len(wanted))
                tops = logits.argmax(-1).tolist()
                assert greedy == all(tops[n - 1] == ids[n] for n in range(known, len(ids)))
        long = " ".join(q for q, _, _ in QUESTIONS)
        whole = score_rolling(loaded, long, 64)
        parts = score_rolling(loaded, long, 16)
        loaded.close()
    ids = begin + words(long, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
    each = logits[np.arange(len(ids) - 1), ids[1:]]
    assert whole == pytest.approx(each.sum(), abs=0.5)
    # Less is known of what a window begins with.
    assert parts < whole


@needs_harness
def test_a_task_of_ones_own(
    task: Path, gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    q8 = str(gguf("Q8_0"))
    assert run_here(["eval-ppl", q8, "--tasks", str(task), "--threads", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (found["artifact"], found["task"], found["metric"]) == (q8, "novels", "acc")
    opened = open_artifact(q8, engine="llama.cpp")
    with opened.model:
        loaded = opened.load(64, 1)
        right = [
            int(np.argmax([score(loaded, q, text, 64)[0] for text in choices])) == gold
            for q, choices, gold in QUESTIONS
        ]
        loaded.close()
    assert found["value"] == np.mean(right)
    command = ["eval-ppl", q8, "--tasks", str(task), "--threads", "1", "--min-task", "novels=1.01"]
    assert run_here(command) == 3
    shown = capsys.readouterr()
    assert "novels" in shown.out
    assert "is below --min-task novels=1.01" in shown.err.replace("\n", " ")


@needs_harness
def test_what_cannot_be_run_is_said_first(
    task: Path, gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = task.with_name("lost.yaml")
    lost.write_text(task.read_text().replace("questions.jsonl", "nowhere.jsonl"))
    writes = task.with_name("writes.yaml")
    text = task.read_text().replace("multiple_choice", "generate_until")
    writes.write_text(
        text.replace('doc_to_choice: "{{choices}}"\n', "").replace(": acc", ": exact_match")
    )
    for name, said in (
        ("no_such_task", "lm-eval has no task no_such_task"),
        (str(lost), "lm-eval cannot load"),
        (str(writes), "lets the model write"),
    ):
        assert run_here(["eval-ppl", str(gguf("Q8_0")), "--tasks", name]) in (1, 2)
        assert said in capsys.readouterr().err.replace("\n", " ")


def test_without_the_harness(
    gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_here(["eval-ppl", str(gguf("Q8_0")), "--tasks", "arc_easy"]) == 1
    assert "pip install lm_eval" in capsys.readouterr().err


def test_a_limit_of_a_task_needs_tasks(
    gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--min-task", "arc_easy=0.5"], "add --tasks"),
        (["--task-limit", "3"], "add --tasks"),
    ):
        assert run_here(["eval-ppl", str(gguf("Q8_0")), "--data", __file__, *words]) == 2
        assert said in capsys.readouterr().err
