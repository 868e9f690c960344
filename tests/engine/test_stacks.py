"""Slices of a stack against the tables they stand for."""

import pytest
import torch

from pyro_vfe.engine.factors import Table
from pyro_vfe.engine.stacks import Stack, StackedTable, stacked_values, whole_stack
from pyro_vfe.errors import VFEError


def slices(count: int = 3) -> tuple[Stack, list[StackedTable]]:
    stack = Stack(torch.randn(count, 2, 4, dtype=torch.float64, requires_grad=True))
    return stack, [StackedTable(stack, t, (f"z_{t}", "data")) for t in range(count)]


def test_a_slice_is_the_table_it_stands_for() -> None:
    stack, tables = slices()
    for t, table in enumerate(tables):
        assert isinstance(table, Table)
        assert torch.equal(table.values, stack.values[t])
        assert table.sizes == {f"z_{t}": 2, "data": 4}
        assert torch.equal(table.aligned(("data", f"z_{t}")), stack.values[t].T)
        assert torch.equal(table.to(torch.float32).values, stack.values[t].float())
        assert torch.equal(table.renamed(("a", "b")).aligned(("b", "a")), stack.values[t].T)


def test_gradients_of_slices_are_those_of_the_stack() -> None:
    stack, tables = slices()
    sum((t + 1) * table.values.exp().sum() for t, table in enumerate(tables)).backward()  # type: ignore[union-attr]
    weights = torch.arange(1.0, 4.0, dtype=torch.float64).reshape(3, 1, 1)
    assert torch.allclose(stack.values.grad, weights * stack.values.detach().exp())  # type: ignore[arg-type]


def test_nothing_is_selected_before_it_is_asked_for() -> None:
    stack, tables = slices()
    assert tables[0].sizes and whole_stack(tables) is stack.values
    assert "parts" not in stack.__dict__ and all("values" not in table.__dict__ for table in tables)


def test_only_all_slices_in_order_are_the_whole_stack() -> None:
    _, tables = slices()
    _, others = slices()
    plain = Table(tables[0].values, tables[0].axes)
    for some in (tables[:2], tables[::-1], [*tables[:2], others[2]], [plain, *tables[1:]], [*tables[:2], plain]):
        assert whole_stack(some) is None


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2], [2, 0], [1], [0, 0, 2]])
def test_stacked_values_are_the_tables_in_order(order: list[int]) -> None:
    _, tables = slices()
    some = [tables[t] for t in order]
    assert torch.equal(stacked_values(some), torch.stack([table.values for table in some]))
    plain = [Table(table.values, table.axes) for table in some]
    assert torch.equal(stacked_values(plain), torch.stack([table.values for table in some]))


def test_equal_tables_are_stacked_without_a_copy() -> None:
    values = torch.randn(3, 3)
    tables = [Table(values, (f"z_{t}", f"z_{t + 1}")) for t in range(5)]
    assert stacked_values(tables).stride() == (0, *values.stride())
    assert torch.equal(stacked_values(tables), torch.stack([values] * 5))


def test_axes_must_name_each_dim_of_the_entry_once() -> None:
    stack, _ = slices()
    for axes in (("z",), ("z", "z"), ("z", "a", "b")):
        with pytest.raises(VFEError, match="was given the axes"):
            StackedTable(stack, 0, axes)
