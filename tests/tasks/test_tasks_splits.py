"""What a problem is about decides its side, whatever else there is."""

from hypothesis import given
from hypothesis import strategies as st

from nanochat.tasks.splits import pick, shuffled, split_by_key

items = st.lists(st.text(max_size=5), max_size=60)
shares = st.floats(min_value=0.01, max_value=0.99)


@given(items, shares)
def test_every_item_is_on_one_side_and_equal_keys_are_together(items: list[str], share: float) -> None:
    train, test = (split_by_key(items, str.lower, split, share) for split in ("train", "test"))
    assert sorted(train + test) == sorted(items)
    assert not {item.lower() for item in train} & {item.lower() for item in test}


@given(items, shares)
def test_two_different_keys_are_enough_for_both_sides(items: list[str], share: float) -> None:
    if len(set(items)) > 1:
        assert split_by_key(items, str, "train", share)
        assert split_by_key(items, str, "test", share)


def test_the_share_for_the_test_is_about_what_was_asked_for() -> None:
    words = [f"word {number}" for number in range(10_000)]
    assert 450 < len(split_by_key(words, str, "test", 0.05)) < 550


@given(st.permutations(list("abcdefghijklmnop")))
def test_the_order_of_items_decides_nothing(items: list[str]) -> None:
    assert split_by_key(items, str, "train", 0.5) == split_by_key(sorted(items), str, "train", 0.5)
    assert shuffled(items, "about") == shuffled(sorted(items), "about")


def test_picks_are_spread_evenly() -> None:
    picked = [pick("abcd", str(number)) for number in range(4000)]
    assert all(850 < picked.count(letter) < 1150 for letter in "abcd")
