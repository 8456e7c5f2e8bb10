"""What a run needs: memory, scratch disk and work, told stage by stage before it begins.

Each part of the code that takes much has a statement of it beside itself, which makes `Stage`s of
the shapes that it will meet. A `Forecast` puts the stages of a run together: memory is what the
hungriest one holds, scratch what lies on the disk when most does, time the sum of all work at what
a unit of it costs on this machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SAMPLES = "samples"
"""The stage in which a model writes windows."""


@dataclass(frozen=True)
class Work:
    """Work by its kind.

    ``products`` are floating-point operations of matrix products in the run's dtype, ``float32``
    those in float32, ``factors`` those of Cholesky factorisations; ``encoded`` and ``descended``
    are weights that an encoder, or feedback with its sweeps, takes, by format; ``read`` and
    ``written`` are bytes of files, ``hashed`` bytes of which a digest is made.
    """

    products: float = 0.0
    float32: float = 0.0
    factors: float = 0.0
    encoded: Mapping[str, float] = field(default_factory=dict)
    descended: Mapping[str, float] = field(default_factory=dict)
    read: float = 0.0
    written: float = 0.0
    hashed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.float32 + other.float32,
            self.factors + other.factors,
            _sum(self.encoded, other.encoded),
            _sum(self.descended, other.descended),
            self.read + other.read,
            self.written + other.written,
            self.hashed + other.hashed,
        )

    def times(self, count: float) -> Work:
        """So much of it."""
        return Work(
            self.products * count,
            self.float32 * count,
            self.factors * count,
            {name: value * count for name, value in self.encoded.items()},
            {name: value * count for name, value in self.descended.items()},
            self.read * count,
            self.written * count,
            self.hashed * count,
        )


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in (one, other):
        for name, value in part.items():
            total[name] += value  # type: ignore[assignment]
    return dict(total)


@dataclass(frozen=True)
class Stage:
    """A part of a run: bytes of memory held besides the process's own, bytes of scratch files.

    ``scratch`` are files that go when it ends, ``kept`` those that stay to the end of the run.
    """

    name: str
    memory: int = 0
    scratch: int = 0
    kept: int = 0
    work: Work = Work()


@dataclass(frozen=True)
class UnitCosts:
    """Seconds for a unit of each kind of `Work` on this machine, with the threads of the run."""

    products: float
    float32: float
    factors: float
    read: float
    written: float
    hashed: float
    encoded: Mapping[str, float] = field(default_factory=dict)
    descended: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, work: Work) -> float:
        """How long the work takes."""
        return (
            work.products * self.products
            + work.float32 * self.float32
            + work.factors * self.factors
            + work.read * self.read
            + work.written * self.written
            + work.hashed * self.hashed
            + sum(count * self.encoded.get(kind, 0.0) for kind, count in work.encoded.items())
            + sum(count * self.descended.get(kind, 0.0) for kind, count in work.descended.items())
        )


@dataclass(frozen=True)
class Forecast:
    """The stages of a run in turn; ``base`` is the memory of the process with its libraries.

    ``seconds`` is None where no unit costs were measured.
    """

    base: int
    stages: Sequence[Stage]
    seconds: float | None = None

    @property
    def memory(self) -> int:
        """Peak resident bytes."""
        return self.base + max((stage.memory for stage in self.stages), default=0)

    @property
    def scratch(self) -> int:
        """Bytes of scratch files when most lie there."""
        kept, most = 0, 0
        for stage in self.stages:
            kept += stage.kept
            most = max(most, kept + stage.scratch)
        return most

    @property
    def kept(self) -> int:
        """Bytes of scratch files that are there until the end."""
        return sum(stage.kept for stage in self.stages)

    @property
    def hungriest(self) -> str:
        """The name of the stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.memory).name if self.stages else ""

    @property
    def work(self) -> Work:
        """All work."""
        total = Work()
        for stage in self.stages:
            total += stage.work
        return total
