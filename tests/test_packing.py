"""Bins of documents: every document once, no bin over the budget, the same on every machine."""

from hypothesis import given
from hypothesis import strategies as some

from tuner.pipeline.packing import pack

LENGTHS = some.lists(some.integers(1, 50), max_size=60)


@given(LENGTHS, some.integers(1, 60))
def test_every_document_is_in_one_bin_and_no_bin_of_several_is_over_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(len(bin_) == 1 or sum(lengths[index] for index in bin_) <= budget for bin_ in bins)


@given(LENGTHS, some.integers(1, 60))
def test_at_most_one_bin_is_less_than_half_full(lengths: list[int], budget: int) -> None:
    """Best fit never opens a bin for what another has room for."""
    filled = [sum(lengths[index] for index in bin_) for bin_ in pack(lengths, budget)]
    assert sum(2 * tokens <= budget for tokens in filled) <= 1


@given(LENGTHS, some.integers(1, 60), some.integers(1, 50))
def test_documents_on_both_sides_of_a_boundary_are_never_together(
    lengths: list[int], budget: int, boundary: int
) -> None:
    bins = pack(lengths, budget, boundary=boundary)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(len({lengths[index] > boundary for index in bin_}) == 1 for bin_ in bins)


def test_best_fit_takes_the_tightest_bin() -> None:
    assert pack([6, 4, 5, 3, 2], 10) == [[0, 1], [2, 3, 4]]


def test_a_document_over_the_budget_stands_alone() -> None:
    assert pack([3, 20, 3], 8) == [[1], [0, 2]]


def test_nothing_packs_into_nothing() -> None:
    assert pack([], 8) == []
