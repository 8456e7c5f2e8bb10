"""The first screen about a model: a list of facts, its stored types, and what it could weigh."""

from __future__ import annotations

from quantcli.fit.choose import has_mxfp4_experts
from quantcli.plan.filetypes import MXFP4_TYPE, TYPE_OF_BITS, USUAL_TYPES
from quantcli.report.facts import Number, number_words
from quantcli.report.inspection import Subject
from quantcli.report.memory import memory_table
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import count_text, percent_text, size_text


def overview_tables(subject: Subject, *, every: bool = False) -> list[Table]:
    """Facts, and what the types that people take would weigh, in fewer lines than a terminal has.

    ``every`` type and stored type, with the memory in each precision. What has no rows is left out.
    """
    sizes = _sizes(subject, every=every)
    tables = [
        facts([row for row in _facts(subject) if row[1]]),
        *([_dtypes(subject)] if every or not sizes.rows else []),
        *([_memory(subject)] if every or not subject.outputs else []),
        sizes,
    ]
    return [table for table in tables if table.rows]


def _facts(subject: Subject) -> list[tuple[str, str]]:
    return [
        ("Architecture", _architecture(subject)),
        ("Parameters", _parameters(subject)),
        ("Layers", _layers(subject)),
        ("Attention", _attention(subject)),
        ("Experts", _experts(subject)),
        ("Context", _context(subject)),
        ("Vocabulary", _vocabulary(subject)),
        ("Stored as", _stored(subject)),
        ("Files", _files(subject)),
        ("Made by", _provenance(subject)),
        ("Key-values", f"{len(subject.metadata)}, see --kv" if subject.metadata else ""),
    ]


def _architecture(subject: Subject) -> str:
    arch, model_class = subject.facts.architecture, subject.facts.model_class
    if arch and model_class:
        return f"{arch} ({model_class})"
    return arch or f"{model_class or 'not named'} (unknown to quantcli)"


def _parameters(subject: Subject) -> str:
    parts = []
    active, embedding = subject.active_parameters, subject.embedding_parameters
    if active is not None:
        parts.append(f"{count_text(active)} active per token")
    if embedding is not None:
        also = ", also the output head" if subject.is_tied else " and the output head"
        parts.append(f"{count_text(embedding)} in the embedding{also}")
    extra = f" ({'; '.join(parts)})" if parts else ""
    return f"{count_text(subject.parameters)}{extra}"


def _layers(subject: Subject) -> str:
    found = subject.facts
    parts = [
        f"{number_words(found.layers)} blocks" if found.layers else "",
        f"{number_words(found.hidden)} wide" if found.hidden else "",
        f"feed-forward {number_words(found.feed_forward)}" if found.feed_forward else "",
    ]
    return ", ".join(filter(None, parts))


def _attention(subject: Subject) -> str:
    found = subject.facts
    if not found.heads:
        return ""
    heads = f"{number_words(found.heads)} heads"
    if found.head_dim:
        heads += f" of {number_words(found.head_dim)}"
    if found.kv_heads and found.kv_heads != found.heads:
        heads += f", {number_words(found.kv_heads)} key-value heads"
    return heads


def _experts(subject: Subject) -> str:
    found = subject.facts
    if not found.experts:
        return ""
    words = f"{number_words(found.experts)} per block"
    if found.experts_used:
        words += f", {number_words(found.experts_used)} used per token"
    if found.expert_feed_forward:
        words += f", feed-forward {number_words(found.expert_feed_forward)}"
    return words


def _context(subject: Subject) -> str:
    found = subject.facts
    if not found.context:
        return ""
    window = f", sliding window {number_words(found.window)}" if found.window else ""
    return f"{number_words(found.context)} tokens{window}"


def _vocabulary(subject: Subject) -> str:
    size: Number = subject.facts.vocabulary
    parts = [f"{number_words(size)} tokens"] if size else []
    if subject.tokenizer:
        pre = f" ({subject.pre_tokenizer})" if subject.pre_tokenizer else ""
        parts.append(f"{subject.tokenizer}{pre}")
    return ", ".join(parts)


def _stored(subject: Subject) -> str:
    types = subject.dtypes()
    name = subject.file_type or " + ".join(dtype for dtype, *_ in types[:3])
    if len(types) > 3 and subject.file_type is None:
        name += " + ..."
    return (
        f"{name}, {len(subject.tensors):,} tensors, {size_text(subject.nbytes)}, "
        f"{subject.bits_per_weight:.2f} bits per weight"
    )


def _files(subject: Subject) -> str:
    first, *others = subject.files
    total = size_text(sum(subject.files.values()))
    if others:
        return f"{1 + len(others)} files, {first.name} and so on, {total}"
    return f"{first.name}, {total}"


def _provenance(subject: Subject) -> str:
    keys = {
        key.removeprefix("quantcli."): str(value.value)
        for key, value in subject.metadata.items()
        if key.startswith("quantcli.")
    }
    if "version" not in keys:
        return ""
    words = f"quantcli {keys['version']}"
    if "source.repo" in keys:
        revision = f"@{keys['source.revision']}" if "source.revision" in keys else ""
        words += f" from {keys['source.repo']}{revision}"
    return words


def _dtypes(subject: Subject) -> Table:
    rows = [
        (dtype, f"{count:,}", count_text(elements), size_text(nbytes), percent_text(share))
        for dtype, count, elements, nbytes in subject.dtypes()
        for share in [nbytes / max(1, subject.nbytes)]
    ]
    columns = (
        Column("Type"),
        Column("Tensors", "right"),
        Column("Weights", "right"),
        Column("Size", "right"),
        Column("Share", "right"),
    )
    # One type is told among the facts already.
    return Table(columns, tuple(rows) if len(rows) > 1 else (), title="Stored types")


def _memory(subject: Subject) -> Table:
    table = memory_table(subject.parameters)
    return Table(
        tuple(Column(each.name, "right") for each in table),
        (tuple(size_text(each.nbytes) for each in table),),
        title="Memory for the weights alone, in each precision",
    )


def _sizes(subject: Subject, *, every: bool) -> Table:
    usual = {*USUAL_TYPES, *([MXFP4_TYPE] if has_mxfp4_experts(subject.outputs) else [])}
    shown = [each for each in subject.sizes if every or each.name in usual]
    bits = {name: str(number) for number, name in TYPE_OF_BITS.items()}
    rows = [
        (
            each.name
            + (" *" if each.needs_importance else "")
            + (" •" if every and each.name in usual else ""),
            bits.get(each.name, ""),
            size_text(each.nbytes),
            f"{each.bits_per_weight:.2f}",
            percent_text(each.nbytes / max(1, subject.nbytes)),
        )
        for each in shown
    ]
    starred = any(each.needs_importance for each in shown)
    notes = ["* needs an --imatrix"] if starred else []
    notes += ["--fit 24G tells which to take"] if shown else []
    if len(shown) < len(subject.sizes):
        notes.append(f"-v lists all {len(subject.sizes)}")
    return Table(
        (
            Column("--type"),
            Column("--bits", "right"),
            Column("Size", "right"),
            Column("Bits per weight", "right"),
            Column("Of today's size", "right"),
        ),
        tuple(rows),
        title="What 'quantcli quantize' would make of it"
        + (" (• types that people take)" if every else ""),
        note="; ".join(notes),
    )
