"""Which sharer layer feeds which receiver layer.

A layer map is a list of `(receiver layer, sharer layer)` in receiver order. With `k > 1` a receiver
layer appears k times (fewer when the sharer has fewer layers), its best sharer layer first.
"""

from __future__ import annotations

LayerMap = list[tuple[int, int]]


def last_aligned(n_receiver: int, n_sharer: int, k: int = 1) -> LayerMap:
    """Pair the last layers, the ones before them, and so on towards the input.

    A deeper receiver shares sharer layer 0 among its first layers. Further choices (`k > 1`) go
    towards the sharer's input first and only then towards its output.
    """
    _check(n_receiver, n_sharer, k)
    pairs = []
    for layer in range(n_receiver):
        best = max(layer + n_sharer - n_receiver, 0)
        order = [*range(best, -1, -1), *range(best + 1, n_sharer)]
        pairs += [(layer, sharer_layer) for sharer_layer in order[:k]]
    return pairs


def k_nearest(n_receiver: int, n_sharer: int, k: int = 1) -> LayerMap:
    """Spread both stacks evenly on [0, 1] and pair each receiver layer with its nearest ones.

    Of two that are equally near, the one closer to the sharer's input comes first. A stack of one
    layer lies at 0. Distances are floating-point differences of the two places, as in published
    checkpoints, so rounding decides some ties when `k > 1`.
    """
    _check(n_receiver, n_sharer, k)
    pairs = []
    for layer, place in enumerate(_places(n_receiver)):
        distances = [abs(place - other) for other in _places(n_sharer)]
        order = sorted(range(n_sharer), key=distances.__getitem__)
        pairs += [(layer, sharer_layer) for sharer_layer in order[:k]]
    return pairs


def _places(n_layers: int) -> list[float]:
    return [layer / max(n_layers - 1, 1) for layer in range(n_layers)]


def _check(n_receiver: int, n_sharer: int, k: int) -> None:
    if min(n_receiver, n_sharer) < 1 or k < 0:
        raise ValueError(f"no layer map for {n_receiver=} {n_sharer=} {k=}")
