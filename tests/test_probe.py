"""How many tokens at once, from measured micro-batches: arithmetic, on any machine."""

from tuner.pipeline.probe import (
    Pieces,
    Room,
    Sample,
    keep_activations,
    most_tokens,
    most_useful,
    recompute_activations,
    with_decoded_weights,
)

MB = 10**6


def samples(per_token: int, fixed: int = 0, sizes: tuple[int, ...] = (1024, 4096)) -> list[Sample]:
    return [Sample(tokens, fixed + per_token * tokens, 0.1) for tokens in sizes]


def room(free_bytes: int) -> Room:
    return Room(free_bytes, later_bytes=0)


def test_tokens_fill_85_percent_of_what_stays_free() -> None:
    found = most_tokens(samples(MB, fixed=500 * MB), Room(11_000 * MB, later_bytes=1000 * MB))
    assert found == (8500 - 500) // 64 * 64
    assert 500 * MB + found * MB <= 0.85 * 10_000 * MB


def test_a_single_sample_and_a_line_that_does_not_rise_promise_nothing_more_than_proportion() -> None:
    assert most_tokens([Sample(1024, 1024 * MB, 0.1)], room(2000 * MB)) == 1700 // 64 * 64
    flat = [Sample(1024, 2048 * MB, 0.1), Sample(2048, 2048 * MB, 0.1)]
    assert most_tokens(flat, room(2000 * MB)) == 1700 // 64 * 64


def test_nothing_fits_where_nothing_was_measured_or_nothing_is_free() -> None:
    assert most_tokens([], room(10**12)) == 0
    assert most_tokens(samples(MB), Room(100 * MB, later_bytes=200 * MB)) == 0


def test_a_micro_batch_is_no_larger_than_a_step_and_holds_the_longest_document() -> None:
    assert most_useful(step_tokens=2700, longest=400) == 2752  # of 64
    assert most_useful(step_tokens=500_000, longest=400) == 16384
    assert most_useful(step_tokens=500_000, longest=20_000) == 20_032


def test_activations_are_kept_where_enough_tokens_fit() -> None:
    kept = samples(MB)
    assert keep_activations(kept, room(100_000 * MB), longest=400, useful=16384) == Pieces(16384, recomputes=False)
    assert keep_activations(kept, room(3000 * MB), longest=400, useful=16384) == Pieces(2496, recomputes=False)
    assert keep_activations(kept, room(2000 * MB), longest=400, useful=16384) is None  # 1,700 tokens: decoding weighs
    assert keep_activations(kept, room(2000 * MB), longest=400, useful=1024) == Pieces(1024, recomputes=False)
    assert keep_activations(kept, room(3000 * MB), longest=2600, useful=16384) is None  # the longest does not fit
    assert keep_activations([], room(10**12), longest=400, useful=16384) is None  # both sizes ran out of memory


def test_with_recomputed_activations_the_longest_document_is_tried_whatever_was_measured() -> None:
    few = samples(MB // 10)
    assert recompute_activations(few, room(1000 * MB), longest=400, useful=16384) == Pieces(8448, recomputes=True)
    assert recompute_activations([], room(10 * MB), longest=400, useful=16384) == Pieces(400, recomputes=True)


def test_weights_stay_decoded_only_where_activations_keep_their_room() -> None:
    kept = samples(MB)
    large, small = room(40_000 * MB), room(16_000 * MB)
    sizes = {"decoded_bytes": 7_200 * MB, "longest": 400}
    assert with_decoded_weights(kept, large, useful=16384, **sizes) == Pieces(16384, recomputes=False)
    assert with_decoded_weights(kept, small, useful=16384, **sizes) is None  # 7,480 tokens left
    assert with_decoded_weights(kept, small, useful=2752, **sizes) == Pieces(2752, recomputes=False)
