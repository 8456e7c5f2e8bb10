"""What ``inspect`` looks at: a model as headers show it, and how its weights could be read.

The same shape for every origin, so that tables and JSON are made in one place;
`quantcli.report.opening` fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from quantcli.plan.sizes import TypeSize
from quantcli.report.facts import Facts
from quantcli.report.weights import WeightSource
from quantcli.types import MetaValue, OutputTensor, PackedType, TensorInfo

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file holds it, and the names of the GGUF tensors that are made of it."""

    info: TensorInfo
    becomes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, scales of its blocks included."""
        return 8 * self.info.nbytes / max(1, self.info.elements)


@dataclass(frozen=True)
class Subject(AbstractContextManager["Subject"]):
    """A model that is being looked at; a context manager that closes its files.

    ``files`` are its files and their bytes; ``outputs`` its tensors under GGUF names, empty for an
    unknown architecture; ``metadata`` a GGUF's key-values, empty for a checkpoint; ``sizes`` what
    each file type would give, empty where that cannot be told; ``notes`` what the reader should
    know.
    """

    kind: str
    label: str
    files: Mapping[Path, int]
    facts: Facts
    tensors: tuple[StoredTensor, ...]
    outputs: tuple[OutputTensor, ...] = ()
    tokenizer: str | None = None
    pre_tokenizer: str | None = None
    file_type: str | None = None
    metadata: Mapping[str, MetaValue] = field(default_factory=dict)
    model_keys: Mapping[str, MetaValue] = field(default_factory=dict, repr=False)
    """The key-values that a GGUF of it has, without those of its tokenizer; a GGUF's own."""
    sizes: tuple[TypeSize, ...] = ()
    notes: tuple[str, ...] = ()
    sources: tuple[WeightSource, ...] = field(default=(), repr=False)
    """The tensors whose weights can be read, under GGUF names where there are any."""
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def parameters(self) -> int:
        """Weights of the model; tables that are computed and tensors of indices do not count."""
        if self.outputs:
            return sum(tensor.elements for tensor in self.outputs if tensor.values is None)
        return sum(t.info.elements for t in self.tensors if holds_weights(t.info.dtype))

    @property
    def active_parameters(self) -> int | None:
        """Weights that one token passes through; None unless a mixture of experts is known."""
        experts, used = self.facts.experts, self.facts.experts_used
        if not isinstance(experts, int) or not isinstance(used, int) or not experts:
            return None
        routed = sum(t.elements for t in self.outputs if "_exps." in t.name)
        return self.parameters - routed + routed * used // experts if routed else None

    @property
    def embedding_parameters(self) -> int | None:
        """Weights of token embedding and output head; None where they are not known."""
        return sum(t.elements for t in self.outputs if t.name in (_EMBEDDING, _HEAD)) or None

    @property
    def is_tied(self) -> bool:
        """Whether the token embedding serves as the output head too."""
        names = {tensor.name for tensor in self.outputs}
        return _EMBEDDING in names and _HEAD not in names

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight as stored, over all tensors."""
        return 8 * self.nbytes / max(1, sum(t.info.elements for t in self.tensors))

    def dtypes(self) -> list[tuple[str, int, int, int]]:
        """Stored types with their tensors, weights and bytes, the largest share first."""
        table: dict[str, tuple[int, int, int]] = {}
        for tensor in self.tensors:
            info = tensor.info
            count, elements, nbytes = table.get(info.dtype, (0, 0, 0))
            table[info.dtype] = (count + 1, elements + info.elements, nbytes + info.nbytes)
        ordered = sorted(table.items(), key=lambda item: (-item[1][2], item[0]))
        return [(dtype, *numbers) for dtype, numbers in ordered]


def holds_weights(dtype: str) -> bool:
    """Whether a stored type holds weights: floats, packed and block formats do, integers not."""
    if isinstance(dtype, PackedType):
        return True
    return dtype.startswith(("F", "BF", "Q", "IQ", "TQ", "MX", "NV")) and dtype != "F8_E8M0"
