"""A Modelfile for Ollama: the GGUF, its chat template in Go's language, its parameters.

Ollama reads the Jinja template of a GGUF by itself, as far as it recognises it. Where the template
is of the simple kind that `quantcli.exports.chat` explains, TEMPLATE says the same in Go's
text/template; else there is none and Ollama's own way holds. BOS is not in it, since the runtime
adds that. Tools are not covered.

Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from quantcli import __version__
from quantcli.artifacts.atomic import refuse_existing, refuse_own, write_file
from quantcli.artifacts.write import ArtifactDone
from quantcli.errors import SourceError
from quantcli.exports.chat import ChatText, explain_template
from quantcli.exports.settings import ending_ids, sampling, special_ids, token_texts
from quantcli.exports.targets import ExportOptions, Prepared
from quantcli.model import Model, open_model
from quantcli.sources.gguf import GgufCheckpoint
from quantcli.sources.resolve import Resolved
from quantcli.types import Event, MetaValue, Note
from quantcli.vocab.special import ADD_BOS

_NAMES = {"repetition_penalty": "repeat_penalty"}
"""Ollama's names of sampling parameters, where they are not transformers'."""
_GO = """\
{{{{- $before := "" }}}}{{{{ range .Messages }}}}\
{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}\
{{{{ else if eq .Role "user" }}}}\
{{{{ if eq $before "" }}}}{first}\
{{{{ else if eq $before "system" }}}}{after_system}\
{{{{ else }}}}{after_assistant}{{{{ end }}}}{{{{ .Content }}}}{answer}\
{{{{ else if eq .Role "assistant" }}}}{reply}{{{{ .Content }}}}{{{{ end }}}}\
{{{{ $before = .Role }}}}{{{{ end }}}}"""


def default_modelfile(gguf: Path) -> Path:
    """``NAME.Modelfile`` beside the GGUF."""
    return gguf.with_name(f"{gguf.name.removesuffix('.gguf')}.Modelfile")


def export_modelfile(model: Model, output: Path, *, force: bool = False) -> Iterator[Event]:
    """Write the Modelfile of a GGUF to ``output``; yields notes and at last `ArtifactDone`.

    SourceError for a checkpoint and for shards, which Ollama does not read.
    """
    check_single(model)
    refuse_existing([output], force=force)
    explained = explain_metadata(model.metadata)
    if "tokenizer.chat_template" not in model.metadata:
        yield Note(f"{model.label} has no chat template, so the Modelfile has no TEMPLATE")
    elif explained is None:
        yield Note(
            "the chat template does more than put text around messages, so the Modelfile has no "
            "TEMPLATE and Ollama uses the GGUF's own as far as it knows it"
        )
    elif not explained.takes_system:
        yield Note(
            "the chat template takes no system message; TEMPLATE puts one before the first words "
            "of the user"
        )
    if not str(model.path).isprintable():
        raise SourceError(f"{model.path}: a Modelfile takes no such name", hint="rename the file")
    if not all(map(str.isprintable, ending_texts(model.metadata))):
        yield Note(
            "a token that ends texts holds line ends or control characters, which a Modelfile "
            "cannot say, so it is not among the stop texts",
            "warning",
        )
    content = modelfile(model, explained, output.parent).encode()
    write_file(output, content, force=force)
    yield ArtifactDone((output,), len(content))


def check_single(model: Model) -> None:
    """SourceError unless ``model`` is one GGUF file."""
    if not isinstance(model.store, GgufCheckpoint):
        raise SourceError(
            f"{model.label} is a checkpoint, and Ollama's FROM takes a GGUF here",
            hint=f"make one first: quantcli quantize {model.label} --bits 4",
        )
    if len(model.store.files) > 1:
        raise SourceError(
            f"{model.label} is in {len(model.store.files)} shards, which Ollama does not read",
            hint=f"merge them first: quantcli export {model.store.files[0]} --to gguf -o FILE",
        )


def explain_metadata(metadata: Mapping[str, MetaValue]) -> ChatText | None:
    """The fixed text of a GGUF's chat template, where it is explained and Go can say it."""
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    tokens = token_texts(metadata)

    def token(role: str) -> str:
        number = special_ids(metadata)[f"{role}_token_id"]
        return str(tokens[number]) if number is not None and 0 <= number < len(tokens) else ""

    adds = metadata.get("tokenizer.ggml.add_bos_token")
    kind = metadata.get("tokenizer.ggml.model")
    adds_bos = bool(adds.value) if adds else kind is not None and kind.value in ADD_BOS
    found = explain_template(
        str(template.value), bos=token("bos"), eos=token("eos"), adds_bos=adds_bos
    )
    unsayable = ("{{", "}}", '"""')
    if found is None or any(mark in piece for mark in unsayable for piece in found.pieces):
        return None
    return found


def go_template(text: ChatText) -> str:
    """The same in Go's text/template, over Ollama's ``.Messages``."""
    return _GO.format(
        system=text.system,
        first=text.first,
        after_system=text.after_system,
        after_assistant=text.after_assistant,
        answer=text.answer,
        reply=text.reply,
    )


def modelfile(model: Model, explained: ChatText | None, folder: Path) -> str:
    """The Modelfile's text; ``folder`` is where it will lie."""
    path = model.path
    where = f"./{path.name}" if path.parent.resolve() == folder.resolve() else path.resolve()
    lines = [f"# quantcli {__version__}", f"FROM {where}"]
    if explained is not None:
        lines += ["", f'TEMPLATE """{go_template(explained)}"""']
    parameters = [(_NAMES.get(k, k), v) for k, v in sampling(model.metadata).items()]
    ends = [text for text in ending_texts(model.metadata) if text.isprintable()]
    parameters += [("stop", _quote(text)) for text in ends]
    if parameters:
        lines += ["", *(f"PARAMETER {name} {value}" for name, value in parameters)]
    return "\n".join(lines) + "\n"


def ending_texts(metadata: Mapping[str, MetaValue]) -> list[str]:
    """The texts of the tokens that end a text, as the GGUF has them."""
    tokens = token_texts(metadata)
    return [str(tokens[n]) for n in ending_ids(metadata) if 0 <= n < len(tokens)]


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def prepare(found: Resolved, label: str, options: ExportOptions, stack: ExitStack) -> Prepared:
    """Decide ``--to ollama``: a Modelfile for a GGUF."""
    if found.kind == "imatrix":
        raise SourceError(f"{label} is an importance matrix", hint="name the model's GGUF")
    model = stack.enter_context(open_model(label, vocabulary=False, found=found))
    check_single(model)
    output = options.output or default_modelfile(found.path)
    if options.check:
        refuse_own([output], [found.path])
        refuse_existing([output], force=options.force)
    return Prepared(
        (output,), 0, f"a Modelfile for {found.path.name}",
        lambda: export_modelfile(model, output, force=options.force),
    )  # fmt: skip
