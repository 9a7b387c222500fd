"""How many Nexus tokens stand for a segment."""

import math


def n_nexus(n_tokens: int, ratio: float, share: float, largest: int) -> int:
    """Nexus tokens of a segment: at least 1, at most `largest`.

    Args:
        n_tokens: tokens of the segment.
        ratio: wanted compression, 0.8 keeps a fifth of the cells.
        share: Nexus tokens' share of the cells that are kept.
        largest: rows of the embedding table.
    """
    # rounded first, since (1 - 0.7) * 10 is a little more than 3
    wanted = math.ceil(round((1 - ratio) * n_tokens * share, 6))
    return min(max(wanted, 1), largest)
