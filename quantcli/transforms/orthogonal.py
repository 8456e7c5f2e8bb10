"""Orthogonal matrices that are cheap to apply: random signs, then a Kronecker product.

A Hadamard matrix spreads every channel evenly over all others. Of size 2^k * m it is the
Kronecker product of Sylvester's 2^k and, for m, Paley's first construction (m - 1 a prime that
leaves 3 modulo 4) or his second (m / 2 - 1 a prime that leaves 1). Where no such m divides the
size, a small random orthogonal matrix is the odd part. Two factors of about equal size
make a product cost columns * 2 * sqrt(columns). Sources: Paley 1933; QuIP# (arXiv:2402.04396).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix diag(signs) (left x right), never built as a whole.

    ``signs`` has shape (n,), ``left`` (a, a) and ``right`` (b, b) with a * b = n; float64.
    """

    signs: Doubles
    left: Doubles
    right: Doubles

    @property
    def size(self) -> int:
        """Channels that it mixes."""
        return len(self.signs)

    def apply(self, values: NDArray[np.floating]) -> Doubles:
        """``values @ Q`` along the last axis, whose length is a multiple of the size.

        Longer axes are turned in consecutive groups, each by the same rotation.
        """
        groups = values.astype(np.float64).reshape(-1, self.size) * self.signs
        grid = groups.reshape(-1, len(self.left), len(self.right))
        turned: Doubles = np.matmul(self.left.T, np.matmul(grid, self.right))
        return turned.reshape(values.shape)

    def matrix(self) -> Doubles:
        """The whole matrix Q, shape (n, n)."""
        return self.apply(np.eye(self.size))


@dataclass(frozen=True)
class Permutation:
    """The permutation that puts channel ``order[i]`` in place i; ``order`` has shape (n,)."""

    order: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Channels that it moves."""
        return len(self.order)

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """``values @ P`` along the last axis, as `Rotation.apply`; exact, and of the same dtype."""
        groups = values.reshape(-1, self.size)
        return np.take(groups, self.order, axis=1).reshape(values.shape)


def make_rotation(size: int, seed: int) -> Rotation:
    """A random rotation of ``size`` channels; the same for the same size and seed, anywhere."""
    # PCG64's stream is promised to stay; the draws are made from its raw bits.
    bits = np.random.PCG64(np.random.SeedSequence([seed, size]))
    signs = 1.0 - 2.0 * (bits.random_raw(size) >> np.uint64(63)).astype(np.float64)
    power = size & -size
    odd = size // power
    small = [odd * 2**k for k in range(power.bit_length())]
    order = next((m for m in small if m == 1 or _is_paley(m, size)), None)
    if order is None:
        order, core = odd, _random_orthogonal(odd, bits)
    else:
        core = np.ones((1, 1)) if order == 1 else _paley(order) / np.sqrt(order)
    halvings = (size // order).bit_length() - 1
    # The core goes to the left factor, and Sylvester's powers even the two out.
    left = min(halvings, max(0, round((halvings - np.log2(order)) / 2)))
    mixed = np.asarray(np.kron(_sylvester(left), core), np.float64)
    return Rotation(signs, mixed, _sylvester(halvings - left))


def _sylvester(halvings: int) -> Doubles:
    whole = np.ones((1, 1))
    for _ in range(halvings):
        whole = np.asarray(np.block([[whole, whole], [whole, -whole]]) / np.sqrt(2.0))
    return whole


def _is_paley(order: int, size: int) -> bool:
    """Whether Paley's constructions give a matrix of that order, small enough to be a factor."""
    if order % 4 or order > max(64, 4 * size**0.5):
        return False
    return _is_prime(order - 1) or (_is_prime(order // 2 - 1) and order % 8 == 4)


def _paley(order: int) -> Doubles:
    """A Hadamard matrix of that order, entries 1 and -1."""
    if _is_prime(order - 1):
        return np.asarray(np.eye(order) + _bordered(order - 1, skew=True))
    symmetric = _bordered(order // 2 - 1, skew=False)
    inner = np.kron(symmetric, np.array([[1.0, 1.0], [1.0, -1.0]]))
    return np.asarray(inner + np.kron(np.eye(order // 2), np.array([[1.0, -1.0], [-1.0, -1.0]])))


def _bordered(prime: int, *, skew: bool) -> Doubles:
    """Jacobsthal's matrix of quadratic residues, with a border of ones and a zero corner."""
    squares = {pow(i, 2, prime) for i in range(1, prime)}
    row = np.array([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    step = np.arange(prime)
    whole = np.zeros((prime + 1, prime + 1))
    whole[1:, 1:] = row[(step[:, None] - step[None, :]) % prime]
    whole[0, 1:] = 1.0
    whole[1:, 0] = -1.0 if skew else 1.0
    return whole


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _random_orthogonal(size: int, bits: np.random.PCG64) -> Doubles:
    """A uniformly random orthogonal matrix: QR of normal draws, signs of R's diagonal made up."""
    uniform = (bits.random_raw(2 * size * size).astype(np.float64) + 0.5) / 2.0**64
    first, second = uniform.reshape(2, size, size)
    normal = np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second)
    q, r = np.linalg.qr(normal)
    return np.asarray(q * np.sign(np.diag(r)))
