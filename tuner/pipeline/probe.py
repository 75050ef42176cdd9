"""Measured micro-batches → how many tokens at once, and whether activations are kept. Arithmetic alone: no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.memory import FILL
from tuner.plan import FEWEST_TOKENS, MICRO_BATCH_TOKENS

ROUND = 64
# With this many tokens at once decoding 4-bit weights is about 3 % of the work: they stay decoded where that leaves
# room for as many.
RESIDENT_TOKENS = 8192


@dataclass(frozen=True)
class Sample:
    """One micro-batch, forward and backward. `peak_bytes` is the most it took above what lies there between two."""

    tokens: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Pieces:
    """How a step is computed: tokens at once, and whether activations are computed again backward."""

    tokens: int
    recomputes: bool


@dataclass(frozen=True)
class Room:
    """What micro-batches may fill. `free_bytes` are free while gradients exist, `later_bytes` of them will be taken
    before the second step: the optimizer's state, gradients on their way to other GPUs."""

    free_bytes: int
    later_bytes: int

    @property
    def bytes(self) -> int:
        """85 % of what stays free: the rest is the allocator's to waste."""
        return max(0, int(FILL * (self.free_bytes - self.later_bytes)))

    def less(self, taken_bytes: int) -> "Room":
        return Room(self.free_bytes - taken_bytes, self.later_bytes)


def most_tokens(samples: Sequence[Sample], room: Room) -> int:
    """How many tokens the room holds, by the straight line through the first and the last sample.

    One sample alone, and a line that does not rise, count as proportional: more than that is never promised.
    """
    if not samples:
        return 0
    ordered = sorted(samples, key=lambda sample: sample.tokens)
    small, large = ordered[0], ordered[-1]
    rise = large.peak_bytes - small.peak_bytes
    if rise <= 0:
        per_token, fixed = large.peak_bytes / large.tokens, 0.0
    else:
        per_token = rise / (large.tokens - small.tokens)
        fixed = max(0.0, small.peak_bytes - per_token * small.tokens)
    if per_token <= 0:
        return 0
    return max(0, int((room.bytes - fixed) / per_token)) // ROUND * ROUND


def most_useful(step_tokens: int, longest: int) -> int:
    """No micro-batch need be larger than the largest step, nor than what fills a GPU; the longest document must fit."""
    useful = max(longest, min(MICRO_BATCH_TOKENS, step_tokens))
    return -(-useful // ROUND) * ROUND


def keep_activations(kept: Sequence[Sample], room: Room, *, longest: int, useful: int) -> Pieces | None:
    """Micro-batches whose activations stay, where enough of them fit: recomputing costs half as much again."""
    tokens = min(useful, most_tokens(kept, room))
    return Pieces(tokens, recomputes=False) if tokens >= max(longest, min(useful, FEWEST_TOKENS)) else None


def recompute_activations(recomputed: Sequence[Sample], room: Room, *, longest: int, useful: int) -> Pieces:
    """What fits with recomputed activations, at least the longest document: where that fails, the step says so."""
    return Pieces(max(longest, min(useful, most_tokens(recomputed, room))), recomputes=True)


def with_decoded_weights(
    kept: Sequence[Sample], room: Room, *, decoded_bytes: int, longest: int, useful: int
) -> Pieces | None:
    """Micro-batches beside weights that stay decoded; None where those would take the room of activations."""
    tokens = min(useful, most_tokens(kept, room.less(decoded_bytes)))
    return Pieces(tokens, recomputes=False) if tokens >= max(longest, min(useful, RESIDENT_TOKENS)) else None
