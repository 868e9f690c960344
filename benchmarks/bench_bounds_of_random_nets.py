"""How loose the best factorised Q leaves F on random sigmoid belief nets, beside the paper that asked first."""

from random_nets import PUBLISHED, best_bounds, bounded_twice, random_nets, section

NUM_NETS, NUM_STARTS = 3000, 4


def test_bounds_of_random_nets(sections: list[str]) -> None:
    """Nothing is timed; the numbers are the same on every machine."""
    nets = random_nets(NUM_NETS)
    bounds, twice = best_bounds(nets, NUM_STARTS), bounded_twice(nets)
    sections.append(section(bounds, twice))
    assert (bounds.surprise < bounds.free_energy).all() and (bounds.free_energy < twice).all()
    assert bounds.looseness.mean() < PUBLISHED
    # Other nets than the paper's: the mean has a standard error of 1.2e-4.
    assert abs((twice / bounds.surprise - 1).mean() - PUBLISHED) < 5e-4
