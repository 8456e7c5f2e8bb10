"""A call of a feedback or sweep kernel, for the installed extension and for the driver alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from support.kernel_cases import FEEDBACK, FEEDBACK_POINTS, SWEEP, SWEEP_POINTS, Case

from quantcli import _native


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of the binding: its arguments by name."""

    label: str
    operation: int
    arguments: Mapping[str, Any]

    @property
    def buffers(self) -> tuple[str, ...]:
        """The arguments that are buffers."""
        kernel = _KERNELS[self.operation]
        every = (*kernel.given, *kernel.changed, *kernel.made)
        return tuple(name for name in every if name in self.arguments)

    def case(self) -> Case:
        """The same for the driver."""
        return self._packed({name: self.arguments[name].tobytes() for name in self.buffers})

    def short(self, name: str) -> Case:
        """The same, one buffer without its last value; of the factor the last row is not read."""
        contents = {each: self.arguments[each].tobytes() for each in self.buffers}
        array = self.arguments[name]
        unread = array.shape[1] if name == "factor" else 0
        contents[name] = contents[name][: (array.size - unread - 1) * array.itemsize]
        return self._packed(contents)

    def _packed(self, contents: Mapping[str, bytes]) -> Case:
        kernel, arrays = _KERNELS[self.operation], self.arguments
        given, changed, made = (
            tuple(contents.get(name, b"") for name in names)
            for names in (kernel.given, kernel.changed, kernel.made)
        )
        shape = (arrays["target"] if "target" in arrays else arrays["gradient"]).shape
        options = kernel.options(arrays)
        return Case(
            self.label, self.operation, shape, options, given, changed, tuple(map(len, made))
        )

    def installed(self) -> tuple[int, bytes]:
        """What the extension gives, as the driver gives it."""
        kernel, arguments = _KERNELS[self.operation], dict(self.arguments)
        names = [name for name in self.buffers if name not in kernel.given]
        arguments |= {name: arguments[name].copy() for name in names}
        kernel.call(**arguments)
        return 0, b"".join(arguments[name].tobytes() for name in names)


@dataclass(frozen=True)
class _Kernel:
    """A kernel in the binding, and its buffers in the order of qk.h."""

    call: Callable[..., None]
    options: Callable[[Mapping[str, Any]], tuple[int, ...]]
    given: tuple[str, ...]
    changed: tuple[str, ...] = ()
    made: tuple[str, ...] = ()


def _lattice_options(given: Mapping[str, Any], odd: int = 0) -> tuple[int, ...]:
    """As lattice_of in driver.c takes them; what a kernel has no use for is zero."""
    levels = given.get("levels", ())
    numbers = (given.get(name, 0) for name in ("uniform", "sub", "block"))
    ranges = (*given.get("scale_range", (0, 0)), *given.get("min_range", (0, 0)))
    return len(levels), *map(int, numbers), int(given.get("half", odd)), odd, *ranges


def _points_options(given: Mapping[str, Any]) -> tuple[int, ...]:
    first, second, signs = given["first"], given["second"], given["signs"]
    group = 2 * first.shape[1]
    width = 8 if signs == "even" else group
    halves = len(first), len(second), int(8 * given["apart"])
    return len(given["patterns"]), group, width, _native.SIGNS[signs], *halves


_GRID = ("first", "second", "patterns")
_KERNELS = {
    FEEDBACK: _Kernel(
        _native.feedback,
        _lattice_options,
        ("levels", "target", "weights", "factor", "steps", "lows"),
        made=("codes", "errors"),
    ),
    SWEEP: _Kernel(
        _native.sweep,
        lambda given: (*_lattice_options(given), int(given["scales_too"])),
        ("levels", "hessian", "sums", "gradient"),
        changed=("codes", "d", "dmin", "scales", "mins"),
    ),
    FEEDBACK_POINTS: _Kernel(
        _native.feedback_points,
        lambda given: (*_points_options(given), given["sub"], given["spread"], given["most"]),
        (*_GRID, "target", "weights", "factor", "metric", "norms", "d"),
        changed=("scales",),
        made=("codes", "errors"),
    ),
    SWEEP_POINTS: _Kernel(
        _native.sweep_points,
        lambda given: (
            *_points_options(given), *_lattice_options(given, odd=1), int(given["scales_too"])
        ),
        (*_GRID, "hessian", "norms", "gradient"),
        changed=("codes", "d", "scales"),
    ),
}  # fmt: skip
