"""What writing outputs from one read of a model needs, and which encoders work in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantcli.artifacts.shared_reads import reads_are_shared, shared_bytes, slab_readers
from quantcli.artifacts.write import peak_memory
from quantcli.formats import get_format
from quantcli.plan.budget import BASE_BYTES
from quantcli.plan.folders import FolderPlan
from quantcli.plan.needs import Stage, Work
from quantcli.plan.planner import Plan
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.rounding.codecs import BlockCodec, WeightCodec, find_codecs
from quantcli.run.outputs import Planned

if TYPE_CHECKING:
    from quantcli.model import Model
    from quantcli.run.methods import Chain


def codecs_of(
    plan: Plan | FolderPlan, model: Model
) -> tuple[Mapping[str, WeightCodec], Mapping[str, WeightCodec]]:
    """`find_codecs`; a folder of types rather than grids has none."""
    if not isinstance(plan, Plan) and not plan.schemes:
        return {}, {}
    return find_codecs(plan, model)


def plain_stage(planned: Sequence[Planned]) -> Stage:
    """Writing outputs from one read: slabs on threads, digests, each format's encoder once."""
    threads = min(each.threads for each in planned)
    memory = max(peak_memory(each.artifact, threads) for each in planned) - BASE_BYTES
    model = planned[0].artifact.model
    if reads_are_shared([each.artifact for each in planned]):
        memory += shared_bytes(model.store, slab_readers(threads, remote=model.is_remote))
    work = Work()
    encoded: set[tuple[str, str]] = set()
    for each in planned:
        artifact = each.artifact
        for tensor, name, count in _encodings(each):
            if (tensor, name) not in encoded:
                encoded.add((tensor, name))
                work += Work(encoded={name: count})
        work += Work(written=float(artifact.nbytes))
    source = float(planned[0].artifact.source_bytes)
    return Stage("writing", memory, work=work + Work(read=source, hashed=source))


def _encodings(planned: Planned) -> list[tuple[str, str, float]]:
    """Tensor, what its encoder is called and its weights, of what is encoded as it is written."""
    plan = planned.artifact.plan
    rounded = set()
    if planned.run is not None and method_chain(planned).rounds:
        rounded = set(codecs_of(plan, planned.run.model)[0])
    if isinstance(plan, Plan):
        return [
            (item.tensor.name, encoder_name(item.format, weighted=item.importance),
             float(item.tensor.elements))
            for item in plan.items if item.tensor.name not in rounded
        ]  # fmt: skip
    found = []
    for item in plan.items:
        kind = item.scheme.label if item.scheme is not None else item.format
        if kind and item.matrix.tensor not in rounded:
            name = encoder_name(kind, weighted=item.importance)
            found.append((item.matrix.module, name, float(item.matrix.elements)))
    return found


def encoder_name(kind: str, *, weighted: bool) -> str:
    """What the work of an encoder is counted under."""
    return f"{kind}, weighted" if weighted else kind


def find_encoders(planned: Sequence[Planned]) -> dict[str, tuple[WeightCodec, bool]]:
    """All codecs that work is counted for, by the name that it is counted under."""
    found: dict[str, tuple[WeightCodec, bool]] = {}
    for each in planned:
        plan = each.artifact.plan
        kinds: dict[str, WeightCodec] = {}
        if isinstance(plan, Plan):
            kinds = {item.format: BlockCodec(get_format(item.format)) for item in plan.items}
        else:
            for item in plan.items:
                if item.format:
                    kinds[item.format] = BlockCodec(get_format(item.format))
            if plan.schemes:
                codecs = codecs_of(plan, each.artifact.model)[1].values()
                kinds |= {codec.name: codec for codec in codecs}
        for kind, codec in kinds.items():
            for weighted in (False, True):
                found[encoder_name(kind, weighted=weighted)] = (codec, weighted)
    return found


def method_chain(planned: Planned) -> Chain:
    """The methods of an output."""
    from quantcli.run.methods import parse_methods

    return parse_methods(planned.artifact.plan.recipe.method or USUAL_ROUNDER)
