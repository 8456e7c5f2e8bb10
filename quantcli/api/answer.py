"""What a new GGUF answers, for ``quantize --run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.artifacts.write import default_threads
from quantcli.errors import UsageError
from quantcli.evals.answer import stream_answer
from quantcli.evals.engines.llama_cpp import load_library
from quantcli.exports.chat import render_prompt
from quantcli.exports.settings import special_ids, token_texts
from quantcli.model import open_model
from quantcli.plan.schemes import GGUF
from quantcli.types import MetaValue

if TYPE_CHECKING:
    from quantcli.run.request import Request


def check_answer(request: Request) -> None:
    """UsageError where no one GGUF is made that could answer; MissingExtraError without llama.cpp.

    Before the work, so that nobody waits for what cannot come.
    """
    made = [each for each in request.outputs if not each.recipe.mmproj_only]
    if request.dry_run:
        raise UsageError("--dry-run makes no file to run", hint="leave --dry-run or --run out")
    if len(made) != 1:
        raise UsageError(
            f"--run runs one file, and this makes {len(made) or 'a tower alone'}",
            hint="name one --type",
        )
    if made[0].recipe.to != GGUF:
        raise UsageError(
            f"--run runs a GGUF in llama.cpp, not a folder for {made[0].recipe.to}",
            hint="leave --to or --run out",
        )
    load_library()


def answer(path: Path, prompt: str, *, threads: int | None = None) -> Iterator[str]:
    """What the GGUF at ``path`` writes after ``prompt``, piece by piece.

    A chat template, if it has one, puts the prompt into a conversation. SourceError for a model
    that writes no text or that llama.cpp cannot run.
    """
    with open_model(path) as model:
        model.require_next_token("run on a prompt")
        rendered = _render(model.metadata, prompt)
    return stream_answer(
        path,
        prompt if rendered is None else rendered,
        is_rendered=rendered is not None,
        threads=threads or default_threads(),
    )


def _render(metadata: Mapping[str, MetaValue], prompt: str) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    tokens, ids = token_texts(metadata), special_ids(metadata)

    def text(role: str) -> str:
        number = ids[f"{role}_token_id"]
        return str(tokens[number]) if number is not None and 0 <= number < len(tokens) else ""

    return render_prompt(str(template.value), prompt, bos=text("bos"), eos=text("eos"))
