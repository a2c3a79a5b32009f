"""Matrices and inputs made of a seed: what golden/make_gptq.py gives to the program of GPTQ's authors, and the tests to
ours."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    kind: str
    n_out: int
    n_in: int
    tokens: int
    group_size: int


# Of more than one block of 128 columns and fewer, with groups that are not full, with fewer tokens than inputs.
CASES = (
    Case("int4", 5, 300, 500, 32),
    Case("int4", 4, 136, 90, 64),
    Case("int8", 3, 150, 300, 150),
    Case("int4", 3, 20, 64, 6),
)


def matrix_and_inputs(seed: int, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A matrix ``[out, in]``, and inputs ``[tokens, in]`` that depend on each other; one of them is always 0.

    Of that one the matrix is 0 too: the authors leave it out, and ours rounds it.
    """
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((case.n_out, case.n_in)).astype(np.float32)
    mixed = rng.standard_normal((case.tokens, 40)) @ rng.standard_normal((40, case.n_in))
    inputs = mixed * rng.exponential(size=case.n_in) + 0.3 * rng.standard_normal((case.tokens, case.n_in))
    weight[:, 7] = inputs[:, 7] = 0
    return weight, inputs.astype(np.float32)
