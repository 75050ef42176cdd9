"""Bins of documents: every document once, no bin over the budget, the same on every machine."""

from hypothesis import given
from hypothesis import strategies as some

from tuner.pipeline.packing import divide, pack

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


# ── among ranks ──────────────────────────────────────────────────────────────────────────────────────────────────────

RANKS = some.integers(1, 9)


@given(LENGTHS, RANKS)
def test_every_document_has_one_rank(lengths: list[int], ranks: int) -> None:
    shares = divide(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)


@given(LENGTHS, RANKS)
def test_ranks_differ_by_less_than_a_document(lengths: list[int], ranks: int) -> None:
    shares = divide(lengths, ranks)
    loads = [sum(lengths[index] for index in share) for share in shares]
    for share, load in zip(shares, loads, strict=True):
        assert not share or load - min(loads) <= min(lengths[index] for index in share)
    assert max(loads) <= sum(lengths) / ranks + max(lengths, default=0)


@given(LENGTHS, RANKS)
def test_no_rank_idles_while_another_has_two_documents(lengths: list[int], ranks: int) -> None:
    counts = [len(share) for share in divide(lengths, ranks)]
    assert counts.count(0) == max(0, ranks - len(lengths))


def test_long_documents_are_dealt_first() -> None:
    assert divide([2, 9, 4, 4, 1], 2) == [[1, 4], [0, 2, 3]]
    assert divide([5], 3) == [[0], [], []]
