"""Changed settings and tensors of every family: the right logits, or a refusal in one sentence.

``scripts/fuzz --kind logits`` runs as many more as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.config_mutations import run_trial
from support.llama_process import LlamaProcess

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TRIALS = 200
GROUP = 20
LEAST = 8
"""Of each group, trials that must come to logits: models that cannot be made prove nothing."""


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaProcess]:
    process = LlamaProcess()
    yield process
    process.close()


@pytest.mark.parametrize("first", range(0, TRIALS, GROUP))
def test_a_changed_model_is_right_or_refused(
    first: int, llama: LlamaProcess, tmp_path: Path
) -> None:
    outcomes = [
        run_trial(seed, tmp_path / str(seed), llama) for seed in range(first, first + GROUP)
    ]
    assert not [outcome for outcome in outcomes if outcome.is_fault]
    assert sum(outcome.kind == "equal" for outcome in outcomes) >= LEAST


def test_a_wrong_file_is_found(
    llama: LlamaProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judgement itself: a family that ignores what changes the logits is a fault."""
    from support import config_mutations
    from support.tiny_models import MODELS, build

    model = tmp_path / "model"
    build("llama", model, changes={"rope_parameters": config_mutations.YARN_ROPE})
    trial = config_mutations.Trial(0, "llama", "yarn", ("rope_parameters",))
    assert config_mutations.judge(trial, model, tmp_path / "right.gguf", llama).kind == "equal"
    monkeypatch.setattr("quantcli.archs.llama.rope_keys", lambda rope: {})
    wrong = config_mutations.judge(trial, model, tmp_path / "wrong.gguf", llama)
    assert MODELS["llama"].config["rope_parameters"]["rope_type"] == "default"
    assert wrong.is_fault
    assert "logits differ" in wrong.detail
