import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.data.splitting import choose_groups, keep_every
from handpose.errors import UserError


@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=30),
    val_fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_no_group_is_divided_and_no_side_is_empty(sizes, val_fraction, seed):
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    chosen = choose_groups(groups, val_fraction=val_fraction, split_seed=seed, what="groups")
    val, train = set(groups[chosen]), set(groups[~chosen])
    assert val
    assert train
    assert not val & train
    if len(val) > 1 and len(train) > 1:
        assert abs(chosen.mean() - val_fraction) <= max(sizes) / sum(sizes)


def test_the_seed_decides():
    groups = np.array([f"g{i}" for i in range(30)])

    def choose(seed: int) -> list[bool]:
        return choose_groups(groups, val_fraction=0.3, split_seed=seed, what="groups").tolist()

    assert choose(1) == choose(1)
    assert choose(1) != choose(2)
    assert sum(choose(1)) == 9


@pytest.mark.parametrize(("groups", "val_fraction"), [(["a", "a"], 0.5), (["a", "b"], 0.0), (["a", "b"], 1.0)])
def test_what_cannot_be_held_out_is_told(groups, val_fraction):
    with pytest.raises(UserError, match=r"val_fraction=.* cannot be held out of \d persons"):
        choose_groups(np.array(groups), val_fraction=val_fraction, split_seed=0, what="persons")


def test_every_third_frame_of_each_sequence():
    sequences = np.array(["a", "b", "a", "a", "b", "a", "a", "b", "b"])
    assert keep_every(sequences, 3).tolist() == [0, 1, 5, 8]
    assert keep_every(sequences, 1).tolist() == list(range(9))


@pytest.mark.parametrize("seed", range(8))
def test_a_large_group_is_not_held_out_instead_of_a_small_fraction(seed):
    groups = np.repeat(["large", "small", "tiny"], [900, 50, 50])
    held_out = choose_groups(groups, val_fraction=0.1, split_seed=seed, what="groups")
    assert held_out.mean() == pytest.approx(0.1)
