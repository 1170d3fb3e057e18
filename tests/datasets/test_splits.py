"""Stratified splits: what every split must be, and the source that gives parts of one."""

import hashlib

import numpy as np
import pytest
from conftest import encoded, random_images
from hypothesis import given
from hypothesis import strategies as st

import dlc_jax as dlc

SAMPLE = "demo:caltech15/train"


def dataset_of(labels, num_classes: int | None = None) -> dlc.Dataset:
    """Samples that differ by id alone; nothing here decodes an image."""
    names = tuple(f"c{j}" for j in range(num_classes or max(labels) + 1))
    ids = np.asarray([f"i{i}" for i in range(len(labels))])
    return dlc.Dataset([b""] * len(labels), np.asarray(labels), ids, names, "made")


def class_sizes(dataset: dlc.Dataset) -> list[int]:
    return np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()


def write_folder(root, num_per_class: int, classes=("ant", "bee", "cat")) -> None:
    images = iter(random_images(num_per_class * len(classes), 12))
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(num_per_class):
            (root / name / f"{i:02}.png").write_bytes(encoded(next(images)))


@st.composite
def percents(draw, smallest: int = 20) -> list[int]:
    """Two or three percents, each large enough for a sample of a class of ten."""
    first = draw(st.integers(smallest, 100 - 2 * smallest))
    second = draw(st.integers(smallest, 100 - first - smallest))
    return [first, 100 - first] if draw(st.booleans()) else [first, second, 100 - first - second]


# class 0 has ten samples or more, so that no part is empty; the others may be of any size
label_lists = st.lists(st.integers(0, 3), max_size=60).flatmap(
    lambda more: st.permutations([0] * 10 + more)
)


@given(labels=label_lists, percents=percents(), seed=st.integers(0, 2**32 - 1))
def test_parts_are_disjoint_and_cover_every_class_at_the_rounded_cut_points(labels, percents, seed):
    dataset = dataset_of(labels, 4)
    parts = dlc.stratified_split(dataset, percents, seed)
    assert len(parts) == len(percents)
    ids = [name for part in parts for name in part.ids.tolist()]
    assert sorted(ids) == sorted(dataset.ids.tolist())
    for label, size in enumerate(class_sizes(dataset)):
        ends = [round(size * sum(percents[: i + 1]) / 100) for i in range(len(percents))]
        found = [class_sizes(part)[label] for part in parts]
        assert np.cumsum(found).tolist() == ends
    for part in parts:
        assert part.class_names == dataset.class_names
        places = [int(name[1:]) for name in part.ids]
        assert places == sorted(places)  # the order of the data set
        assert part.labels.tolist() == [labels[place] for place in places]


@given(labels=label_lists, percents=percents(), seed=st.integers(0, 99), data=st.data())
def test_membership_does_not_depend_on_the_order(labels, percents, seed, data):
    dataset = dataset_of(labels, 4)
    shuffled = dataset.subset(np.asarray(data.draw(st.permutations(range(len(labels))))))
    split = zip(
        dlc.stratified_split(dataset, percents, seed),
        dlc.stratified_split(shuffled, percents, seed),
        strict=True,
    )
    assert all(set(one.ids) == set(other.ids) for one, other in split)


def test_other_classes_do_not_change_a_class():
    few = dataset_of([0] * 20)
    more = dataset_of([0] * 20 + [1] * 13)
    for one, other in zip(
        dlc.stratified_split(few, (60, 20, 20)),
        dlc.stratified_split(more, (60, 20, 20)),
        strict=True,
    ):
        assert one.ids.tolist() == other.ids[other.labels == 0].tolist()


@given(seed=st.integers(0, 2**32 - 2))
def test_the_same_seed_gives_the_same_split_and_another_one_another(seed):
    dataset = dataset_of([0] * 40 + [1] * 40)
    first, again, other = (
        [part.ids.tolist() for part in dlc.stratified_split(dataset, (50, 50), s)]
        for s in (seed, seed, seed + 1)
    )
    assert first == again
    assert first != other  # equal by chance once in 10^22


def test_the_split_is_the_documented_one():
    """A split is part of a result: it must not change between versions."""
    parts = dlc.stratified_split(dataset_of([0] * 10), (60, 20, 20), 7)
    order = sorted(range(10), key=lambda i: hashlib.sha256(f"7\0i{i}".encode()).hexdigest())
    expected = [sorted(order[:6]), sorted(order[6:8]), sorted(order[8:])]
    assert [[int(name[1:]) for name in part.ids] for part in parts] == expected
    assert expected == [[1, 3, 4, 5, 6, 7], [0, 9], [2, 8]]


@pytest.mark.parametrize(
    ("percents", "seed", "says"),
    [
        ((100,), 0, "expected two or three percents .* got '100'"),
        ((25, 25, 25, 25), 0, "expected two or three percents"),
        ((60, 20, 10), 0, "add up to 100, got 60/20/10, which make 90"),
        ((120, -20), 0, "percent of validation: must be >= 0, got -20"),
        ((60, 40), -1, "seed: expected an integer"),
        ((80, 0, 20), 0, r"stratified_split of made: the part validation \(0 %\) is empty"),
        ((99, 1), 0, r"the part validation \(1 %\) is empty.*largest class, which has 10"),
    ],
)
def test_splits_that_cannot_be(percents, seed, says):
    with pytest.raises(dlc.InputError, match=says):
        dlc.stratified_split(dataset_of([0] * 10), percents, seed)


def test_source_on_the_bundled_sample():
    whole = dlc.load_dataset(SAMPLE)
    sources = [f"split:60/20/20:{part}:{SAMPLE}" for part in ("train", "validation", "test")]
    parts = [dlc.load_dataset(source) for source in sources]
    assert [class_sizes(part) for part in parts] == [[30] * 15, [10] * 15, [10] * 15]
    assert [part.name for part in parts] == sources
    same = dlc.stratified_split(whole, (60, 20, 20))
    assert [part.fingerprint for part in parts] == [part.fingerprint for part in same]
    both = dlc.load_dataset(f"split:60/20/20:train+validation:{SAMPLE}")
    kept = [name for name in whole.ids if name in set(parts[0].ids) | set(parts[1].ids)]
    assert both.ids.tolist() == kept
    assert both[0].image == whole[int(np.flatnonzero(whole.ids == kept[0])[0])].image
    backwards = dlc.load_dataset(f"split:60/20/20:validation+train:{SAMPLE}")
    assert backwards.ids.tolist() == kept
    other = dlc.load_dataset(f"split:60/20/20@7:test:{SAMPLE}")
    assert class_sizes(other) == [10] * 15
    assert set(other.ids) != set(parts[2].ids)


def test_source_without_a_validation_part():
    train, test = (dlc.load_dataset(f"split:80/0/20:{p}:{SAMPLE}") for p in ("train", "test"))
    assert (class_sizes(train), class_sizes(test)) == ([40] * 15, [10] * 15)
    assert not set(train.ids) & set(test.ids)


def test_source_on_a_folder_with_colons_and_parts_of_its_own(tmp_path):
    root = tmp_path / "a:b+c"
    write_folder(root / "train", 10)
    write_folder(root / "val", 5)
    source = f"split:80/20:validation:folder:{root}/train"
    assert class_sizes(dlc.load_dataset(source)) == [2, 2, 2]
    both = dlc.load_dataset(f"split:80/20:train:folder:{root}/train+val")
    assert class_sizes(both) == [12, 12, 12]
    assert both.class_names == ("ant", "bee", "cat")
    nested = dlc.load_dataset(f"split:50/50:train:split:80/20:train:folder:{root}/train")
    assert class_sizes(nested) == [4, 4, 4]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("split:60/20/20", "split:60/20/20: expected split:<train>/<validation>"),
        (f"split:60/20/20@:test:{SAMPLE}", "expected split:<train>/<validation>"),
        (f"split:60/20/-20:test:{SAMPLE}", "expected split:<train>/<validation>"),
        (f"split:60/20/20::{SAMPLE}", "expected split:<train>/<validation>"),
        ("split:60/20/20:test:", "expected split:<train>/<validation>"),
        (f"split:100:train:{SAMPLE}", "expected split:<train>/<validation>"),
        (f"split:60/20/30:test:{SAMPLE}", f"split:60/20/30:test:{SAMPLE}: .* which make 110"),
        (f"split:60/20/20@4294967296:test:{SAMPLE}", "seed: expected an integer"),
        (f"split:60/20/20:{SAMPLE}", "unknown value 'demo'; valid: train, validation, test"),
        (f"split:80/20:test:{SAMPLE}", "part of 80/20: unknown value 'test'; valid: train, val"),
        (f"split:80/20:train+train:{SAMPLE}", "parts: 1 occur more than once, first train"),
        (f"split:80/0/20:validation:{SAMPLE}", r"the part validation \(0 %\) is empty"),
        ("split:80/20:train:/data/x", "'/data/x' is no source"),
        ("split:80/20:train:folder:/no/such", "folder:/no/such: no such folder"),
    ],
)
def test_sources_of_no_split(source, says):
    with pytest.raises(dlc.InputError, match=says):
        dlc.load_dataset(source)
