"""Whether a tensor holds bits, beside the support that torch gives to a Bernoulli."""

import math

import pytest
import torch
from torch.distributions import constraints

from pyro_vfe.program.bits import are_bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_taken_for_a_bit_where_torch_takes_it(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    expected = constraints.boolean.check(numbers)
    assert [are_bits(number) for number in numbers[expected]] == [True, True, True]  # 0, -0 and 1
    assert not any(are_bits(number) for number in numbers[~expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_beside_0_and_1_are_no_bits(dtype: torch.dtype) -> None:
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for number in (1 - eps / 2, 1 + eps, tiny, tiny / 4, -tiny, -1.0, 0.5, math.inf, -math.inf, math.nan):
        assert not are_bits(torch.tensor([0.0, 1.0, number, 1.0], dtype=dtype)), number


@pytest.mark.parametrize("place", [0, 2**17 - 1, 2**17, 300_000 - 1])
def test_one_number_among_many_bits_is_found_in_every_portion(place: int) -> None:
    bits = torch.arange(300_000.0).remainder(2)
    assert are_bits(bits)
    assert are_bits(bits.reshape(3, -1).mT)
    bits[place] = 0.5
    assert not are_bits(bits)


def test_no_numbers_are_bits() -> None:
    assert are_bits(torch.zeros(0, 4))
