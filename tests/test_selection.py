"""Which entries of a parameter a tensor consists of: read off the graph, whatever operations selected them."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vfe.program.log_prob import slim
from pyro_vfe.program.parameters import Parameters, restore, snapshot, unconstrained, write
from pyro_vfe.program.selection import Origins

Z = torch.tensor([[2], [0], [1]])


def read() -> dict[str, Tensor]:
    """The parameters as a watched program reads them."""

    def program() -> None:
        pyro.param("table", torch.ones(3, 4) / 4, constraint=constraints.simplex)
        pyro.param("rates", torch.ones(3), constraint=constraints.positive)
        pyro.param("locs", torch.zeros(3, 4))

    parameters = Parameters()
    parameters.watched(program, "model")()
    return parameters.values


SELECTIONS: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], str]] = {
    "itself": (lambda p: p["rates"], "rates"),
    "by a latent": (lambda p: p["rates"][Z], "rates"),
    "gather": (lambda p: p["locs"].gather(-1, Z), "locs"),
    "index_select and flip": (lambda p: p["locs"].index_select(0, Z.flatten()).flip(-1), "locs"),
    "transposed": (lambda p: p["locs"].mT[1:], "locs"),
    "expanded": (lambda p: p["rates"].expand(5, 3), "rates"),
    "stacked": (lambda p: torch.stack([p["rates"][2], p["rates"][0]]), "rates"),
    "joined": (lambda p: torch.cat([p["locs"][0], p["locs"][2]]), "locs"),
    "times one": (lambda p: p["rates"] * 1.0, "rates"),
    "one-hot product": (lambda p: torch.eye(3)[Z.flatten()] @ p["rates"], "rates"),
    "in a plate": (lambda p: slim(dist.Poisson(p["rates"][Z]).expand([3, 5]).rate, 0), "rates"),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_an_index_reproduces_the_selection_at_other_values(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    select, parameter = SELECTIONS[name]
    pyro.clear_param_store()
    values = read()
    selection = Origins(values).slot(select(values), name).selection
    assert selection is not None and selection.parameter == parameter
    write({parameter: values[parameter].detach() + torch.rand(values[parameter].shape)})
    after = read()
    assert torch.equal(after[parameter].flatten()[selection.index], select(after))


OTHERS: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], set[str]]] = {
    "mean of equal entries": (lambda p: p["rates"].mean(), {"rates"}),
    "sum of a row": (lambda p: p["table"].sum(-1), {"table"}),
    "average of two": (lambda p: (p["rates"][0] + p["rates"][2]) / 2, {"rates"}),
    "shifted": (lambda p: p["rates"] + 1, {"rates"}),
    "complement": (lambda p: 1 - p["table"], {"table"}),
    "exponential": (lambda p: p["locs"].exp(), {"locs"}),
    "product of two": (lambda p: p["rates"][:, None] * p["locs"], {"rates", "locs"}),
    "constant": (lambda p: torch.ones(3), set()),
    "detached": (lambda p: p["rates"].detach(), set()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_selection_is_told_by_the_parameters_it_depends_on(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    make, depends_on = OTHERS[name]
    pyro.clear_param_store()
    values = read()
    slot = Origins(values).slot(make(values), name)
    assert slot.selection is None
    assert slot.depends_on == depends_on


def test_the_root_of_a_variance_is_a_selection_through_its_root() -> None:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    read()
    write({"rates": torch.tensor([4.0, 9.0, 2.0])})
    values = read()
    selection = Origins(values).slot(values["rates"][Z].sqrt(), "scale").selection
    assert selection is not None and selection.through == "sqrt"
    assert torch.equal(selection.index, Z)


@pytest.mark.parametrize("given", ["probs", "logits"])
def test_normalised_probabilities_are_entries_of_what_was_given(given: str) -> None:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    values = read()
    table = values["table"] if given == "probs" else values["locs"]
    fn = dist.Categorical(**{given: table[Z]}).expand([3, 5])
    selection = Origins(values).slot(slim(getattr(fn, given), 1), given, normalised=True).selection
    assert selection is not None
    assert torch.equal(selection.index.reshape(3, 4), torch.arange(12).reshape(3, 4)[Z.flatten()])


def test_what_is_known_of_a_slot_is_dropped_when_its_numbers_say_otherwise() -> None:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    read()
    write({"rates": torch.tensor([4.0, 9.0, 2.0])})
    known: dict[object, Tensor] = {}
    values = read()
    for index in (torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 1])):
        selection = Origins(values, known).slot(values["rates"][index], "slot").selection
        assert selection is not None and torch.equal(selection.index, index)


def test_parameters_are_written_and_restored_in_place() -> None:
    pyro.clear_param_store()
    read()
    leaf, before = unconstrained("table"), snapshot(["table"])
    write({"table": torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3)})
    assert unconstrained("table") is leaf
    assert torch.equal(pyro.param("table").detach()[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    restore(before)
    assert torch.equal(leaf.detach(), before["table"])
