"""What a quantization made, or a dry run planned, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantcli.artifacts.gguf_file import GgufFile
from quantcli.plan.schemes import GGUF
from quantcli.ranks.share import Share
from quantcli.report.tables import Table
from quantcli.report.units import duration_text, size_text
from quantcli.run.outputs import Quantized


def quantized_sentence(done: Quantized) -> str:
    """Sizes before and after, and how long it took."""
    return (
        f"{size_text(done.artifact.source_bytes)} became {size_text(done.artifact.nbytes)} at "
        f"{done.artifact.bits_per_weight:.2f} bits per weight ({done.artifact.plan.label}) "
        f"in {duration_text(done.seconds)}"
    )


def quantized_document(done: Quantized) -> dict[str, Any]:
    """The same with exact numbers, and what became of each tensor that a method rounded."""
    recipe = done.artifact.plan.recipe
    fields: dict[str, Any] = {
        "paths": [str(path) for path in done.artifact.paths],
        **({} if recipe.to == GGUF else {"to": recipe.to}),
        "type": done.artifact.plan.label,
        "bytes": done.artifact.nbytes,
        "bits_per_weight": done.artifact.bits_per_weight,
        "source_bytes": done.artifact.source_bytes,
        "source_digest": done.digest,
    }
    if not isinstance(done.artifact, GgufFile):
        from quantcli.report.folders import static_fields

        fields |= static_fields(done.artifact)
    if done.outcomes:
        fields["tensors"] = [outcome.fields for outcome in done.outcomes]
    if done.training is not None:
        fields["end_to_end"] = done.training
    return fields


def planned_document(planned: Quantized) -> dict[str, Any]:
    """What each tensor would become, and what it would cost."""
    if isinstance(planned.artifact, GgufFile):
        from quantcli.report.plans import plan_document

        return plan_document(planned.artifact, planned.threads, planned.forecast)
    from quantcli.report.folders import folder_document

    return folder_document(planned.artifact, planned.threads, planned.forecast)


def shard_document(share: Share) -> dict[str, Any]:
    """What a shard says that is done before the others: the output is not there yet."""
    return {"shard": share.index + 1, "of": share.count, "published": False}


def output_document(output: Quantized, *, planned: bool) -> dict[str, Any]:
    """The document of one output, planned or made."""
    return planned_document(output) if planned else quantized_document(output)


def whole_document(outputs: Sequence[Quantized], *, planned: bool) -> dict[str, Any]:
    """The document of the output, or of a set; under "mmproj" that of a tower beside it."""
    from quantcli.report.output_sets import set_document

    main = [output for output in outputs if not output.is_tower]
    if not main:
        return output_document(outputs[0], planned=planned)
    documents = [output_document(output, planned=planned) for output in main]
    found = documents[0] if len(main) == 1 else set_document(main, documents, planned=planned)
    towers = [output for output in outputs if output.is_tower]
    return found | ({"mmproj": output_document(towers[0], planned=planned)} if towers else {})


def planned_tables(planned: Quantized) -> list[Table]:
    """The same as tables."""
    if isinstance(planned.artifact, GgufFile):
        from quantcli.report.plans import plan_tables

        return plan_tables(planned.artifact, planned.threads, planned.forecast)
    from quantcli.report.folders import folder_tables

    return folder_tables(planned.artifact, planned.threads, planned.forecast)
