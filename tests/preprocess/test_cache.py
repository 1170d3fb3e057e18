"""Decoded images on disk: found again, checked, bounded, and shared by processes."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, random_images, subset

import dlc_jax as dlc
from dlc_jax.preprocess.cache import _key
from dlc_jax.preprocess.images import load_images

SIZE = 32
MIB = 2**20


@pytest.fixture
def few(small_sample) -> dlc.Dataset:
    """Thirty images, in the order of their ids."""
    return subset(small_sample, np.argsort(small_sample.ids)[::2])


@pytest.fixture
def cache(tmp_path) -> dlc.ImageCache:
    return dlc.ImageCache(str(tmp_path / "cache"))


def entry(cache: dlc.ImageCache, dataset: dlc.Dataset, size: int = SIZE) -> Path:
    return cache.path / _key(dataset, size)


def no_decoding(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("dlc_jax.preprocess.images.decode", refuse)


def test_what_is_cached_is_what_is_decoded(few, cache, monkeypatch):
    plain = load_images(few, SIZE)
    filled = load_images(few, SIZE, cache=cache)
    no_decoding(monkeypatch)
    found = load_images(few, SIZE, cache=cache)
    for loaded in (filled, found):
        np.testing.assert_array_equal(loaded.pixels, plain.pixels)
        np.testing.assert_array_equal(loaded.positions, plain.positions)
    assert isinstance(found.pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.pixels[0] = 0


def test_another_size_or_content_is_another_entry(few, cache):
    load_images(few, SIZE, cache=cache)
    load_images(few, 40, cache=cache)
    images = [few[i].image for i in range(len(few))]
    images[7] = images[8]
    changed = dlc.Dataset(images, few.labels, few.ids, few.class_names)
    np.testing.assert_array_equal(
        load_images(changed, SIZE, cache=cache).pixels, load_images(changed, SIZE).pixels
    )
    assert len({entry(cache, few), entry(cache, few, 40), entry(cache, changed)}) == 3
    assert len(list(cache.path.glob("*/pixels.raw"))) == 3


def test_the_same_content_from_another_source_is_the_same_entry(few, cache, tmp_path, monkeypatch):
    for i in range(len(few)):
        path = tmp_path / "images" / str(few.ids[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(few[i].image)
    load_images(few, SIZE, cache=cache)
    folder = dlc.load_dataset(f"folder:{tmp_path}/images")
    assert folder.ids.tolist() == few.ids.tolist()
    no_decoding(monkeypatch)
    load_images(folder, SIZE, cache=cache)


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "longer", "json", "shape", "gone", "folder", "file"]
)
def test_a_damaged_entry_is_made_anew(few, cache, damage):
    expected = load_images(few, SIZE, cache=cache).pixels.copy()
    pixels, facts = entry(cache, few) / "pixels.raw", entry(cache, few) / "entry.json"
    content = pixels.read_bytes()
    if damage == "flip":
        pixels.write_bytes(content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:])
    elif damage == "cut":
        pixels.write_bytes(content[:-1])
    elif damage == "longer":
        pixels.write_bytes(content + b"\0")
    elif damage == "json":
        facts.write_text(facts.read_text()[:-10])
    elif damage == "shape":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "shape": [1, SIZE]}))
    elif damage == "folder":
        facts.unlink()
        facts.mkdir()
    elif damage == "file":
        shutil.rmtree(facts.parent)
        facts.parent.write_bytes(b"")
    else:
        pixels.unlink()
    np.testing.assert_array_equal(load_images(few, SIZE, cache=cache).pixels, expected)
    assert pixels.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"problems": {"4": "unreadable"}},
        {"problems": {}},
        {"problems": {"5": "another reason"}},
        {"problems": {"5": "unreadable", "30": "out of range"}},
        {"problems": {"5": "unreadable", "-1": "out of range"}},
        {"problems": {"05": "unreadable"}},
        {"problems": ["unreadable"]},
        {"shape": [30, "32"]},
        {"checksums": []},
        {"checksums": 5},
        {"sha256": "0" * 64},
        {"sha256": None},
    ],
)
def test_an_index_that_was_changed_is_made_anew(few, cache, change):
    images = [few[i].image for i in range(len(few))]
    images[5] = b"broken"
    broken = dlc.Dataset(images, few.labels, few.ids, few.class_names)
    plain = load_images(broken, SIZE, on_corrupt="skip")
    load_images(broken, SIZE, on_corrupt="skip", cache=cache)
    facts = entry(cache, broken) / "entry.json"
    content = facts.read_bytes()
    assert list(json.loads(content)["problems"]) == ["5"]
    facts.write_text(json.dumps({**json.loads(content), **change}))
    found = load_images(broken, SIZE, on_corrupt="skip", cache=cache)
    assert found.positions.tolist() == plain.positions.tolist()
    assert found.skipped == plain.skipped
    np.testing.assert_array_equal(found.pixels, plain.pixels)
    assert facts.read_bytes() == content


def test_an_entry_of_other_images_is_made_anew(few, cache):
    """Copied over whole: same shape, other pixels."""
    reverse = dlc.Dataset(
        [few[i].image for i in range(len(few))][::-1], few.labels, few.ids, few.class_names
    )
    for dataset in (few, reverse):
        load_images(dataset, SIZE, cache=cache)
    for name in ("pixels.raw", "entry.json"):
        shutil.copy(entry(cache, few) / name, entry(cache, reverse) / name)
    np.testing.assert_array_equal(
        load_images(reverse, SIZE, cache=cache).pixels, load_images(reverse, SIZE).pixels
    )


def test_unreadable_images_are_remembered_and_still_an_error(few, cache, monkeypatch):
    images = [few[i].image for i in range(len(few))]
    images[3], images[9] = b"broken", images[9][:100]
    broken = dlc.Dataset(images, few.labels, few.ids, few.class_names)
    with pytest.raises(ValueError, match=str(few.ids[3])):
        load_images(broken, SIZE, cache=cache)
    assert [path for path in cache.path.iterdir() if path.is_dir()] == []
    plain = load_images(broken, SIZE, on_corrupt="skip")
    load_images(broken, SIZE, on_corrupt="skip", cache=cache)
    no_decoding(monkeypatch)
    found = load_images(broken, SIZE, on_corrupt="skip", cache=cache)
    np.testing.assert_array_equal(found.pixels, plain.pixels)
    assert found.skipped == plain.skipped
    assert found.positions.tolist() == plain.positions.tolist()
    with pytest.raises(ValueError, match=f"{few.ids[3]}.*on_corrupt='skip'"):
        load_images(broken, SIZE, cache=cache)


def noise(seed: int) -> dlc.Dataset:
    """1,000 images of 32 px, which are 2.93 MiB."""
    return dlc.array_dataset(random_images(1000, 37, seed), [0, 1] * 500)


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    cache = dlc.ImageCache(str(tmp_path), max_gib=10 * MIB / 2**30)
    sets = [noise(seed) for seed in range(4)]
    for number, dataset in enumerate(sets[:3]):
        load_images(dataset, SIZE, cache=cache)
        facts = entry(cache, dataset) / "entry.json"
        os.utime(facts, (number, number))
    load_images(sets[0], SIZE, cache=cache)  # used again
    load_images(sets[3], SIZE, cache=cache)
    there = [entry(cache, dataset).is_dir() for dataset in sets]
    assert there == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.raw")) <= 10 * MIB


def test_what_is_in_use_is_not_removed(tmp_path):
    cache = dlc.ImageCache(str(tmp_path), max_gib=4 * MIB / 2**30)
    first, second = noise(0), noise(1)
    reader = dlc.Images(first, SIZE, cache=cache).evaluation_crops()
    streamed = load_images(second, SIZE, cache=cache)  # no room: not kept
    np.testing.assert_array_equal(streamed.pixels, load_images(second, SIZE).pixels)
    assert entry(cache, first).is_dir()
    assert not entry(cache, second).exists()
    del reader
    load_images(second, SIZE, cache=cache)
    assert entry(cache, second).is_dir()
    assert not entry(cache, first).exists()


@pytest.mark.parametrize("max_gib", [0, 0.001])
def test_a_cache_that_is_off_or_too_small_writes_nothing(tmp_path, max_gib):
    cache = dlc.ImageCache(str(tmp_path / "cache"), max_gib=max_gib)
    loaded = load_images(noise(0), SIZE, cache=cache)
    assert loaded.pixels.shape == (1000, SIZE, SIZE, 3)
    assert not cache.path.exists()
    for bad, says in ((-1, ">= 0"), (float("nan"), "finite"), (float("inf"), "finite")):
        with pytest.raises(ValueError, match=rf"cache\.max_gib: .*{says}"):
            dlc.ImageCache(max_gib=bad)


def test_a_folder_that_cannot_be_written_to_is_named(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache\.folder: .*file/cache cannot be used"):
        load_images(few, SIZE, cache=dlc.ImageCache(str(tmp_path / "file" / "cache")))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on the size of files in place of a full disk."""
    program = f"""
        import resource
        import numpy as np
        import dlc_jax as dlc
        from dlc_jax.preprocess.images import load_images
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        images = np.random.default_rng(0).integers(0, 256, (100, 37, 37, 3), np.uint8)
        try:
            load_images(dlc.array_dataset(images, [0, 1] * 50), 32,
                        cache=dlc.ImageCache({str(tmp_path)!r}))
        except dlc.InputError as error:
            print(error)
    """
    said = run(program)
    assert "cannot be used: File too large" in said
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]  # empty files


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_two_processes_at_once_decode_once(tmp_path, few):
    for i in range(len(few)):
        path = tmp_path / "images" / str(few.ids[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(few[i].image)
    program = f"""
        import hashlib, time
        import dlc_jax as dlc
        from dlc_jax.preprocess import images
        from dlc_jax.preprocess.images import load_images
        decoded = []
        plain = images.decode
        def slow(image, name, deep_images):
            decoded.append(name)
            time.sleep(0.02)
            return plain(image, name, deep_images)
        images.decode = slow
        dataset = dlc.load_dataset("folder:{tmp_path}/images")
        loaded = load_images(dataset, 32, cache=dlc.ImageCache({str(tmp_path / "cache")!r}))
        print(len(decoded), hashlib.sha256(loaded.pixels.tobytes()).hexdigest())
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [process.communicate()[0].split() for process in processes]
    assert sorted(int(number) for number, _ in said) == [0, 0, 30]
    assert len({digest for _, digest in said}) == 1


def test_entries_that_others_finish_or_give_up_are_no_error(tmp_path):
    """Room is made while other processes' entries appear and vanish."""
    cache = dlc.ImageCache(str(tmp_path), max_gib=100 * MIB / 2**30)
    stop = threading.Event()

    def come_and_go(name: str) -> None:
        while not stop.is_set():
            (tmp_path / name).mkdir()
            for file in ("pixels.raw", "entry.json"):
                (tmp_path / name / file).write_bytes(b"x" * 1000)
            shutil.rmtree(tmp_path / name)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in (".a.tmp", "b")]
    for thread in threads:
        thread.start()
    try:
        for _ in range(1500):
            assert cache._make_room(MIB)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_what_a_killed_process_left_is_cleared(few, cache):
    load_images(few, SIZE, cache=cache)
    leftover = cache.path / f".{'0' * 32}.dlc_jax-{os.uname().nodename}-999999999.tmp"
    leftover.mkdir()
    (leftover / "pixels.raw").write_bytes(b"x" * 1000)
    load_images(few, SIZE, cache=cache)
    assert not leftover.exists()


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert dlc.ImageCache().path == tmp_path / "dlc_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert dlc.ImageCache().path == Path("~/.cache/dlc_jax").expanduser()
    assert dlc.ImageCache("~/x").path == Path("~/x").expanduser()


def test_png_and_jpeg_alike(cache):
    images = [encoded(pixels) for pixels in random_images(4, 50)]
    dataset = dlc.array_dataset(images, [0, 1, 0, 1])
    np.testing.assert_array_equal(
        load_images(dataset, SIZE, cache=cache).pixels, load_images(dataset, SIZE).pixels
    )
