"""Log-space sums where floating point is weakest: zeros, underflow and their gradients."""

import pytest
import torch
from engine.graphs import GRAPHS, INF

from pyro_vfe.engine import Table, log_normalizer
from pyro_vfe.engine.execution import execute
from pyro_vfe.engine.logspace import SumProduct, linear_contract, log_sum_exp, weighted

close = torch.testing.assert_close
LEFT, RIGHT = ("n", "s"), ("s", "m")


def contracted(product: SumProduct, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return product.contract(Table(left, LEFT), Table(right, RIGHT), ("n", "m"), ("s",)).values


def test_a_sum_of_zeros_is_minus_infinity_with_gradient_zero() -> None:
    values = torch.tensor([[-INF, -INF], [0.0, -INF]], requires_grad=True)
    total = log_sum_exp(values, (1,))
    close(total, torch.tensor([-INF, 0.0]))
    first = torch.autograd.grad(total.sum(), values, create_graph=True)[0]
    close(first, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert torch.autograd.grad(first.pow(2).sum(), values)[0].isfinite().all()


@pytest.mark.parametrize("careful", [True, False])
def test_supports_that_do_not_meet_give_minus_infinity_with_gradient_zero(careful: bool) -> None:
    left = torch.tensor([[0.0, -INF], [1.0, 2.0]], requires_grad=True)
    right = torch.tensor([[-INF, 0.5], [0.0, 0.1]], requires_grad=True)
    total = contracted(SumProduct(careful=careful), left, right)
    assert total[0, 0] == -INF
    for gradient in torch.autograd.grad(total[0, 0], (left, right), retain_graph=True):
        assert (gradient == 0).all()
    assert torch.autograd.gradcheck(lambda a: contracted(SumProduct(careful=careful), a, right.detach())[1], left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_careful_sums_survive_underflow_and_the_others_say_so(dtype: torch.dtype) -> None:
    left = torch.tensor([[0.0, -800.0], [0.0, 0.0]], dtype=dtype)
    right = torch.tensor([[-800.0, 0.0], [0.0, -1.0]], dtype=dtype)
    lazy, careful = SumProduct(careful=False), SumProduct(careful=True)
    assert contracted(lazy, left, right)[0, 0] == -INF
    assert lazy.underflowed()
    close(contracted(careful, left, right), (left[:, :, None] + right).logsumexp(1))


@pytest.mark.parametrize("name", ["loop", "mixture", "crossing plates under a global", "nested plates"])
def test_lazy_and_careful_execution_agree_where_nothing_underflows(name: str) -> None:
    lazy = SumProduct(careful=False)
    found = execute(GRAPHS[name], lazy).factors
    assert not lazy.underflowed()
    close(sum(factor.table.values for factor in found), log_normalizer(GRAPHS[name]).total)


def test_underflown_entries_have_second_derivatives() -> None:
    left = torch.tensor([[0.0, -800.0], [0.0, 0.3]], requires_grad=True)
    right = torch.tensor([[-800.0, 0.0], [0.2, -1.0]], requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a, b: contracted(SumProduct(careful=True), a, b), (left, right))


def test_a_weight_of_zero_makes_zero_even_of_minus_infinity() -> None:
    table = Table(torch.tensor([-INF, -1.0], requires_grad=True), ("n",))
    found = weighted(table, Table(torch.tensor([0.0, 2.0]), ("n",)))
    close(found.values, torch.tensor([0.0, -2.0]))
    close(torch.autograd.grad(found.values.sum(), table.values)[0], torch.tensor([0.0, 2.0]))
    close(weighted(table, 0.0).values, torch.zeros(2))


def test_a_matrix_product_finds_its_axes_by_name() -> None:
    left = Table(torch.rand(2, 3, 4, 5), ("s", "n", "alone", "batch"))
    right = Table(torch.rand(5, 6, 2), ("batch", "m", "s"))
    expected = torch.einsum("snab,bms->mbn", left.values, right.values)
    close(linear_contract(left, right, ("m", "batch", "n")), expected)
