"""The kernels under the address and undefined-behaviour sanitizers, on buffers of exact size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import descent_cases, kernel_cases, kernel_driver, rows
from support.descent_problem import Problem
from support.kernel_cases import Case, Kernel

from quantcli import _native
from quantcli.formats import FORMATS, get_format

pytestmark = pytest.mark.slow

FLAGS = (
    "-O1",
    "-g1",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-DQK_INLINE=static __attribute__((unused))",
)
SHAPES = ((1, 0), (3, 0), (2, 1280), (5, 256), (19, 96), (1, 9 * 256))
"""Rows, and about how many weights in each: fewer blocks than lanes, and more."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    return kernel_driver.build(folder, kernel_driver.compiler(), _native.available(), FLAGS)


@pytest.fixture(scope="module")
def kernels(driver: Path) -> list[Kernel]:
    return kernel_driver.list_kernels([driver])[1]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return descent_cases.make()


@pytest.fixture(scope="module")
def cases(kernels: list[Kernel], problems: list[Problem]) -> list[Case]:
    encoding = kernel_cases.make(kernels, SHAPES)
    return [*encoding, *(problem.case() for problem in problems)]


@pytest.fixture(scope="module")
def runs(driver: Path, cases: list[Case]) -> dict[str, kernel_driver.Run]:
    return {isa: kernel_driver.run([driver], isa, cases) for isa in _native.available()}


def test_the_driver_is_what_is_installed(driver: Path, kernels: list[Kernel]) -> None:
    assert kernel_driver.list_kernels([driver])[0] == list(_native.available())
    encoders = {kernel.type_id for kernel in kernels if kernel.encodes}
    assert encoders >= {get_format(name).type_id for name in FORMATS}


@pytest.mark.parametrize("isa", _native.available())
def test_nothing_is_reported(
    runs: dict[str, kernel_driver.Run], cases: list[Case], isa: str
) -> None:
    run = runs[isa]
    ended = "" if len(run.results) == len(cases) else cases[len(run.results)].label
    assert (run.code, ended, run.report) == (0, "", "")


@pytest.mark.parametrize("isa", _native.available()[1:])
def test_instruction_sets_agree(
    runs: dict[str, kernel_driver.Run], cases: list[Case], isa: str
) -> None:
    best = runs[_native.available()[0]]
    assert kernel_driver.differences(cases, best, runs[isa]) == []


@pytest.mark.parametrize("isa", _native.available())
def test_the_installed_kernels_agree(
    runs: dict[str, kernel_driver.Run], problems: list[Problem], isa: str
) -> None:
    """Feedback and sweeps, for which there is no other implementation."""
    active = _native.isa()
    try:
        _native.select(isa)
        wanted = [problem.installed() for problem in problems]
    finally:
        _native.select(active)
    got = runs[isa].results[-len(problems) :]
    apart = zip(problems, wanted, got, strict=True)
    assert [problem.label for problem, one, other in apart if one != other] == []


@pytest.mark.parametrize(
    "part", ["no rows' end", "no weights' end", "no blocks' end", "no values' end"]
)
@pytest.mark.parametrize("isa", _native.available())
def test_a_step_beyond_a_buffer_is_caught(driver: Path, isa: str, part: str) -> None:
    fmt = get_format("Q4_K")
    kernel = Kernel(fmt.type_id, fmt.block, fmt.nbytes, True, True)
    x, weights = rows.make("random", 1, 256), rows.importance("spread", 256)
    whole = kernel_cases.encoding(kernel, x, weights, part)
    decoding = kernel_cases.decoding(kernel, bytes(fmt.nbytes))
    short = {
        "no rows' end": replace(whole, given=(whole.given[0][:-4], whole.given[1])),
        "no weights' end": replace(whole, given=(whole.given[0], whole.given[1][:-4])),
        "no blocks' end": replace(whole, made=(whole.output_bytes - 1,)),
        "no values' end": replace(decoding, made=(decoding.output_bytes - 4,)),
    }
    run = kernel_driver.run([driver], isa, [short[part]])
    assert run.code != 0
    assert "ERROR: AddressSanitizer" in run.report
    assert str(kernel_driver.NATIVE / "kernels") in run.report


_SHORT = [
    (problem.operation, name) for problem in descent_cases.smallest() for name in problem.buffers
]


@pytest.mark.parametrize(("operation", "name"), _SHORT)
def test_a_step_beyond_a_buffer_of_feedback_and_sweeps_is_caught(
    driver: Path, operation: int, name: str
) -> None:
    problem = next(p for p in descent_cases.smallest() if p.operation == operation)
    run = kernel_driver.run([driver], _native.available()[0], [problem.short(name)])
    assert run.code != 0
    assert "ERROR: AddressSanitizer" in run.report
    assert str(kernel_driver.NATIVE / "kernels") in run.report


def test_undefined_arithmetic_is_caught(driver: Path) -> None:
    """A row so long that its length in bytes is beyond 64 bits."""
    x = np.zeros((1, 1), np.float32)
    kernel = Kernel(0, 1, 4, True, True)
    case = replace(kernel_cases.encoding(kernel, x, None, "endless"), shape=(1, 1 << 61))
    run = kernel_driver.run([driver], _native.available()[-1], [case])
    assert run.code != 0
    assert "signed integer overflow" in run.report
