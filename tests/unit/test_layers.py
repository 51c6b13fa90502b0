import pytest

from c2c_mlx.fusion.layers import k_nearest, last_aligned

SIZES = [(28, 28), (28, 24), (24, 28), (30, 18), (1, 1), (1, 7), (7, 1)]


@pytest.mark.parametrize("n_receiver, n_sharer", SIZES)
@pytest.mark.parametrize("layer_map", [last_aligned, k_nearest])
def test_every_receiver_layer_has_one_sharer_layer_in_order(layer_map, n_receiver, n_sharer):
    pairs = layer_map(n_receiver, n_sharer)
    assert [receiver for receiver, _ in pairs] == list(range(n_receiver))
    sharers = [sharer for _, sharer in pairs]
    assert sharers == sorted(sharers)
    assert all(0 <= sharer < n_sharer for sharer in sharers)


def test_equal_stacks_pair_layer_by_layer():
    assert last_aligned(5, 5) == k_nearest(5, 5) == [(i, i) for i in range(5)]


def test_last_aligned_repeats_the_first_sharer_layer():
    assert last_aligned(4, 2) == [(0, 0), (1, 0), (2, 0), (3, 1)]


def test_k_nearest_spreads_both_stacks():
    assert k_nearest(4, 7) == [(0, 0), (1, 2), (2, 4), (3, 6)]


def test_more_choices_than_layers_gives_all_layers():
    assert k_nearest(2, 2, k=5) == [(0, 0), (0, 1), (1, 1), (1, 0)]
    assert last_aligned(1, 3, k=5) == [(0, 2), (0, 1), (0, 0)]


def test_no_choices_gives_an_empty_map():
    assert k_nearest(3, 3, k=0) == last_aligned(3, 3, k=0) == []


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 2)])
def test_an_empty_stack_is_an_error(sizes):
    with pytest.raises(ValueError, match="no layer map"):
        k_nearest(*sizes)
