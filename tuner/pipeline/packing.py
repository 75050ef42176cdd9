"""Documents → micro-batches: several documents in one row of tokens that never see each other.

A micro-batch is one row (1, T) with T at most the token budget. Attention gets the documents' boundaries
(`cu_seq_lens`), positions restart, and no token is padding. How many documents an optimizer step has is not decided
here: packing changes what is computed together, never what is computed.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def divide(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of each rank's documents, ascending: every document has one rank, and no rank has more tokens than
    another by more than one document of its own. A rank has none where there are fewer documents than ranks."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def pack(lengths: Sequence[int], budget: int, *, boundary: int | None = None) -> list[list[int]]:
    """Indices of the documents of each micro-batch, best fit first; a document longer than `budget` stands alone.

    Equal lengths give equal bins on every machine. Documents up to and above `boundary` tokens are never together:
    models with longrope choose their frequencies by the longest position in the row.
    """
    if boundary is not None:
        short = [index for index, length in enumerate(lengths) if length <= boundary]
        long = [index for index, length in enumerate(lengths) if length > boundary]
        return [
            [group[index] for index in bin_]
            for group in (short, long)
            for bin_ in pack([lengths[index] for index in group], budget)
        ]
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([index])
            left, chosen = budget - length, len(bins) - 1
        else:
            left, chosen = room.pop(place)
            bins[chosen].append(index)
            left -= length
        if left > 0:
            insort(room, (left, chosen))
    return bins
