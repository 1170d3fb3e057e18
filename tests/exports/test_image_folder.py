"""An exported image folder is read back whole, by `folder:` and by torchvision."""

import collections
import io
import json
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, random_images
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

import dlc_jax as dlc
from dlc_jax.preprocess.decode import decode


@pytest.fixture(scope="module")
def image_folder(timm):
    from torchvision.datasets import ImageFolder

    return ImageFolder


def mpo(pixels: np.ndarray) -> bytes:
    buffer, second = io.BytesIO(), Image.fromarray(pixels[::-1])
    Image.fromarray(pixels).save(buffer, "MPO", save_all=True, append_images=[second])
    return buffer.getvalue()


def with_mode(pixels: np.ndarray, mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def contents() -> list[bytes | np.ndarray]:
    """Images of every format that is read, all different."""
    pixels = iter(random_images(24, 12, seed=5))
    kinds = [("JPEG", {}), ("PNG", {}), ("BMP", {}), ("GIF", {}), ("WEBP", {}), ("TIFF", {})]
    kinds += [("PPM", {})]
    kinds += [("JPEG2000", {})] if features.check("jpg_2000") else []
    kinds += [("AVIF", {})] if features.check("avif") else []
    found = [encoded(next(pixels), kind, **options) for kind, options in kinds]
    found += [mpo(next(pixels)), next(pixels), next(pixels)[:, :, :1]]
    found += [with_mode(next(pixels), mode, "PNG") for mode in ("P", "LA", "RGBA", "1")]
    found += [with_mode(next(pixels), "L", "GIF"), with_mode(next(pixels), "CMYK", "JPEG")]
    found += [with_mode(next(pixels), "LA", "JPEG2000")] if features.check("jpg_2000") else []
    return found


POOL = contents()


def rgb(image: bytes | np.ndarray) -> tuple:
    decoded = decode(image, "")
    return decoded.size, decoded.tobytes()


def read_by_us(root: Path) -> collections.Counter:
    back = dlc.load_dataset(f"folder:{root}")
    return collections.Counter(
        (back.class_names[back.labels[i]], rgb(back[i].image)) for i in range(len(back))
    )


def read_by_torchvision(image_folder, root: Path) -> collections.Counter:
    back = image_folder(root)
    return collections.Counter(
        (back.classes[label], (image.size, image.tobytes())) for image, label in back
    )


def names_of(root: Path) -> dict[str, str]:
    """Returns class names by folder, of those that are not the folder's."""
    path = root / "class_names.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_reads_back(image_folder, dataset: dlc.Dataset, root: Path) -> None:
    names = names_of(root)
    expected = collections.Counter(
        (dataset.class_names[dataset.labels[i]], rgb(dataset[i].image)) for i in range(len(dataset))
    )
    for found in (read_by_us(root), read_by_torchvision(image_folder, root)):
        assert {(names.get(name, name), image): n for (name, image), n in found.items()} == expected
    check_names(root)


def check_names(root: Path) -> None:
    """Every name is one that any file system keeps, and no two are the same to any of them."""
    paths = [path.relative_to(root) for path in root.rglob("*")]
    folded = collections.Counter(
        unicodedata.normalize("NFD", unicodedata.normalize("NFD", str(path)).casefold())
        for path in paths
        if not (root / path).is_dir()
    )
    assert max(folded.values()) == 1
    folders = {path for path in paths if (root / path).is_dir()}
    as_folders = {unicodedata.normalize("NFD", str(path)).casefold() for path in folders}
    assert not as_folders & set(folded)
    for path in paths:
        assert len(str(path).encode()) <= 500
        for name in path.parts:
            assert len(name.encode()) <= 255
            assert name[0] != "."
            assert name[-1] not in ". "
            assert not set(name) & set('\\:*?"<>|')
            assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in name)
            assert name.split(".")[0].rstrip().upper() not in {
                "CON", "PRN", "AUX", "NUL", "COM1", "LPT9", "COM¹",
            }  # fmt: skip


NASTY = [
    "a", "A", "a.png", "A.PNG", "a.mpo", "b.gif", ".png", ".hidden", "..", ".", "", "CON",
    "con.png", "aux .txt", "LPT9", "COM¹", "trailing.", "trailing ", "x" * 250, "é", "e\u0301",
    "ß", "ss", "İ", "i̇", "new\nline", "\x7f", "\x85", "\u202egnp.exe", "a\\b", "q?", "*",
    "@eaDir", "__MACOSX", "train", "Test", "val", "class_names.json", "a-", "  ", "🦙.webp",
    "c:", "lost+found", "日本語" * 40,
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), max_size=8),
)
IDS = st.lists(
    st.lists(TEXTS, min_size=1, max_size=4).map("/".join),
    min_size=1,
    max_size=len(POOL),
    unique=True,
)
CLASSES = st.lists(TEXTS.filter(str.strip), min_size=1, max_size=4, unique=True)


@settings(max_examples=30, deadline=None)
@given(IDS, CLASSES, st.integers(0, 10**6))
@example(["a.png", "a.png/b.png", "A.PNG"], ["x"], 0)
@example(["x/a.png", "X/A.PNG", "x"], ["Cat", "cat"], 0)
@example([f"{i}" for i in range(len(POOL))], ["train", "VAL"], 0)
@example(["train/a.png", "train/b.png"], ["train"], 0)
@example(["a"], ["class_names.json"], 0)
@example(["a-0.png", "é.png", "e\u0301.png"], ["é", "e\u0301"], 0)
def test_any_names_are_read_back_by_both(image_folder, ids, classes, seed):
    ids = [name.rstrip("\0") for name in ids]
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(classes), len(ids))
    images = [POOL[i] for i in rng.permutation(len(POOL))[: len(ids)]]
    dataset = dlc.Dataset(images, labels, np.array(ids), tuple(classes))
    with tempfile.TemporaryDirectory() as place:
        root = dlc.export(dataset, np.arange(len(ids)), f"{place}/x", form="image_folder")
        check_reads_back(image_folder, dataset, root)


def test_links_of_every_format_are_read_back_by_both(image_folder, tmp_path):
    suffixes = ("jfif", "apng", "bmp", "GIF", "webp", "tiff", "pnm", "jp2", "avif", "mpo")
    images = [content for content in POOL if isinstance(content, bytes)][: len(suffixes)]
    lines = ["path,label"]
    for i, (content, suffix) in enumerate(zip(images, suffixes, strict=True)):
        (tmp_path / f"{i}.{suffix}").write_bytes(content)
        lines.append(f"{i}.{suffix},{'ab'[i % 2]}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    dataset = dlc.load_dataset(f"csv:{tmp_path}/table.csv")
    root = dlc.export(dataset, np.arange(len(images)), tmp_path / "x", form="image_links")
    check_reads_back(image_folder, dataset, root)
    assert {path.resolve().read_bytes() for path in root.rglob("*.*")} == set(images)


def test_folders_and_names_are_kept_where_they_can_be(tmp_path):
    ids = ["cat/0.png", "cat/in/0.JPG", "train/cat/0.png", "dog/x.mpo", "dog/plain", "cat/0.bmp"]
    labels = ["cat", "cat", "cat", "dog", "dog", "dog"]
    contents = [encoded(image) for image in random_images(6, 8)]
    contents[3] = mpo(random_images(1, 8)[0])
    dataset = dlc.array_dataset(contents, labels, ids=ids)
    root = dlc.export(dataset, np.arange(6), tmp_path / "x", form="image_folder")
    held = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}
    names = ["cat/0.png", "cat/in/0.JPG", "cat/train/0.png", "dog/x.mpo.jpg", "dog/plain.png"]
    assert held == dict(zip([*names, "dog/cat/0.bmp"], contents, strict=True))


def test_class_names_that_are_no_folder_names_are_told(tmp_path):
    classes = ("Cat", "cat", "CON", "a/b", "fine")
    dataset = dlc.Dataset(
        [encoded(image) for image in random_images(5, 8)],
        np.arange(5),
        np.array([f"{i}.png" for i in range(5)]),
        classes,
    )
    root = dlc.export(dataset, np.arange(5), tmp_path / "x", form="image_folder")
    names = names_of(root)
    assert sorted(names.values()) == sorted(classes)
    assert {path.name for path in root.iterdir()} == {*names, "class_names.json"}
    for folder, name in names.items():
        assert (root / folder / f"{classes.index(name)}.png").exists()
    assert names["Cat"] == "Cat"
    assert names["fine"] == "fine"
    other = dlc.export(dataset, [1, 3], tmp_path / "z", form="image_folder")
    assert {folder: names[folder] for folder in names_of(other)} == names_of(other)
    plain = dlc.export(dataset, [0, 4], tmp_path / "y", form="image_folder")
    assert (plain / "Cat" / "0.png").exists()


def test_other_formats_become_png_without_loss_and_others_keep_their_bytes(tmp_path):
    deep = np.arange(144, dtype=np.uint16).reshape(12, 12) * 400
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "JPEG2000", irreversible=False)
    clear = random_images(1, 12)[0]
    alpha = np.dstack([clear, clear[:, :, 0]])
    images = [buffer.getvalue(), encoded(alpha, "JPEG2000"), encoded(clear, "WEBP")]
    dataset = dlc.array_dataset(images, [0, 0, 0], ids=["deep.jp2", "alpha.jp2", "w.webp"])
    root = dlc.export(dataset, [0, 1, 2], tmp_path / "x", form="image_folder")
    np.testing.assert_array_equal(np.asarray(Image.open(root / "0" / "deep.jp2.png")), deep)
    np.testing.assert_array_equal(np.asarray(Image.open(root / "0" / "alpha.jp2.png")), alpha)
    assert (root / "0" / "w.webp").read_bytes() == images[2]


@pytest.mark.parametrize("form", ["image_folder", "parquet", "hf", "image_links"])
def test_what_is_no_image_is_not_copied_whatever_its_name(tmp_path, form):
    (tmp_path / "0.png").write_bytes(encoded(random_images(1, 8)[0]))
    (tmp_path / "secret.png").write_text("the user's private key")
    (tmp_path / "t.csv").write_text("path,label\n0.png,a\nsecret.png,b\n")
    dataset = dlc.load_dataset(f"csv:{tmp_path}/t.csv")
    with pytest.raises(dlc.InputError, match="secret.png' is not a readable image"):
        dlc.export(dataset, [0, 1], tmp_path / "x", form=form)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("form", ["image_folder", "image_links"])
def test_the_images_themselves_are_not_replaced(tmp_path, form):
    for i, content in enumerate(POOL[:2]):
        (tmp_path / "run" / "x" / f"{i}").mkdir(parents=True)
        (tmp_path / "run" / "x" / f"{i}" / "image.png").write_bytes(content)
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    dataset = dlc.load_dataset(f"folder:{tmp_path}/linked/x")
    for place in ("run/x", "run", "run/x/0", "linked/x"):
        with pytest.raises(dlc.InputError, match="which would be deleted; expected another place"):
            dlc.export(dataset, [0, 1], tmp_path / place, form=form, overwrite=True)
    dlc.export(dataset, [0, 1], tmp_path / "run" / "x" / "new", form=form)
    assert len(dlc.load_dataset(f"folder:{tmp_path}/run/x/new")) == 2
    assert [dataset[i].image for i in range(2)] == POOL[:2]


@pytest.mark.parametrize("form", ["image_folder", "parquet"])
def test_a_file_that_is_gone_is_named(tmp_path, form):
    for name in "ab":
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "0.png").write_bytes(POOL[1])
    dataset = dlc.load_dataset(f"folder:{tmp_path}/x")
    (tmp_path / "x" / "b" / "0.png").unlink()
    with pytest.raises(dlc.InputError, match="sample 'b/0.png' cannot be read: .*No such file"):
        dlc.export(dataset, [0, 1], tmp_path / "y", form=form)
    assert not (tmp_path / "y").exists()


def test_arrays_of_the_other_byte_order_keep_their_values(tmp_path):
    pixels = np.arange(16, dtype=">u2").reshape(4, 4) * 4000
    dataset = dlc.Dataset([pixels], np.array([0]), np.array(["deep"]), ("a",))
    dlc.export(dataset, [0], tmp_path / "x", form="image_folder")
    with Image.open(tmp_path / "x" / "a" / "deep.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("folders", [("train_set", "test_set"), ("Evaluation", "train")])
def test_classes_named_like_splits_with_sub_folders_read_back(tmp_path, folders):
    ids = [f"{name}/sub/0.png" for name in folders]
    dataset = dlc.array_dataset(POOL[:2], folders, ids=ids)
    dlc.export(dataset, [0, 1], tmp_path / "x", form="image_folder")
    assert len(dlc.load_dataset(f"folder:{tmp_path}/x")) == 2


@pytest.mark.parametrize(
    "pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)]
)
def test_arrays_that_png_would_cut_are_refused(tmp_path, pixels):
    dataset = dlc.Dataset([pixels], np.array([0]), np.array(["deep"]), ("a",))
    with pytest.raises(dlc.InputError, match=f"'deep' is an array of {pixels.dtype}.*PNG"):
        dlc.export(dataset, [0], tmp_path / "x", form="image_folder")
