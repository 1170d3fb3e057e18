import io

import numpy as np
import pytest
from conftest import encoded, random_images, subset
from PIL import Image

import dlc_jax as dlc
from dlc_jax.preprocess.decode import RandomCrops, decode, random_box, resized_crop
from dlc_jax.preprocess.images import load_images
from dlc_jax.preprocess.transform import PAPER


def test_the_papers_transform_is_torchvisions(timm, sample):
    from torchvision import transforms

    generator = np.random.default_rng(0)
    images = [decode(sample[i].image, "x") for i in range(0, 750, 50)]
    for height, width in ((300, 40), (40, 300), (5, 7), (73, 73), (64, 100), (1, 1), (257, 256)):
        images.append(Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)))
    for image_size in (64, 224, 33):
        theirs = transforms.Compose(
            [
                transforms.Resize(round(image_size * 256 / 224)),
                transforms.CenterCrop(image_size),
            ]
        )
        for image in images:
            np.testing.assert_array_equal(PAPER(image, image_size), np.asarray(theirs(image)))


def modes() -> dict[str, bytes]:
    """An image file for each of the ways that real data deviate from 8-bit RGB."""
    pixels = random_images(1, 16)[0]
    rgb = Image.fromarray(pixels)
    wide = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees when shown
    files = {
        "grey": (rgb.convert("L"), "PNG", {}),
        "palette": (rgb.convert("P"), "PNG", {}),
        "palette with transparency": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "rgba": (rgb.convert("RGBA"), "PNG", {}),
        "grey and alpha": (rgb.convert("LA"), "PNG", {}),
        "one bit": (rgb.convert("1"), "PNG", {}),
        "cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "16 bit": (Image.fromarray(wide), "PNG", {}),
        "exif rotated": (rgb, "JPEG", {"exif": exif}),
        "gif": (rgb, "GIF", {}),
        "webp": (rgb, "WEBP", {}),
    }
    found = {}
    for name, (image, kind, options) in files.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("name", modes())
def test_every_mode_is_what_pil_converts_it_to(name):
    data = modes()[name]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data, "x", "clip")), expected)
    assert expected.shape == (16, 16, 3)


def test_arrays_are_images_too():
    pixels = random_images(1, 16)[0]
    np.testing.assert_array_equal(np.asarray(decode(pixels, "x")), pixels)
    for grey in (pixels[:, :, 0], pixels[:, :, :1]):
        image = np.asarray(decode(grey, "x"))
        np.testing.assert_array_equal(image, np.repeat(pixels[:, :, :1], 3, axis=2))
    for bad in (pixels.astype(np.float32), pixels[None], pixels[:0]):
        with pytest.raises(ValueError, match="sample 'x' is not a readable image.*uint8"):
            decode(bad, "x")


@pytest.fixture
def broken(small_sample):
    """Sixty samples, of which one is truncated, one empty and one text."""
    images = [small_sample[i].image for i in range(60)]
    images[10], images[20], images[30] = images[10][:900], b"", b"<html>not found</html>"
    return dlc.Dataset(
        images, small_sample.labels, small_sample.ids, small_sample.class_names, "broken"
    )


def test_corrupt_images_stop_the_run_by_id(broken, sample_encoder):
    with pytest.raises(ValueError, match=f"broken: sample '{broken.ids[10]}' is not a readable"):
        load_images(broken, 64)
    with pytest.raises(ValueError, match=str(broken.ids[10])):
        dlc.probe(sample_encoder, broken, image_size=64)


@pytest.mark.slow
def test_corrupt_images_are_skipped_and_listed_on_request(broken, small_sample, sample_encoder):
    options = {"image_size": 64, "num_probes": 2}
    probes = dlc.probe(sample_encoder, dlc.Images(broken, on_corrupt="skip"), **options)
    bad = [10, 20, 30]
    assert list(probes.skipped) == broken.ids[bad].tolist()
    assert "truncated" in probes.skipped[broken.ids[10]]
    good = np.setdiff1d(np.arange(60), bad)
    np.testing.assert_array_equal(probes.ids, broken.ids[good])
    np.testing.assert_array_equal(probes.labels, broken.labels[good])
    alone = dlc.probe(sample_encoder, subset(small_sample, good), **options)
    np.testing.assert_allclose(probes.losses, alone.losses, atol=2e-6)


def test_files_that_cannot_be_read_are_named_or_skipped(tmp_path):
    for name in ("a/1", "a/2", "b/3"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(random_images(1)[0]))
    dataset = dlc.load_dataset(f"folder:{tmp_path}")
    whole = dataset.fingerprint
    (tmp_path / "a" / "2.png").unlink()
    dataset = dlc.Dataset(dataset.images, dataset.labels, dataset.ids, dataset.class_names)
    assert dataset.fingerprint != whole
    with pytest.raises(ValueError, match=r"sample 'a/2\.png' cannot be read"):
        load_images(dataset, 32)
    loaded = load_images(dataset, 32, on_corrupt="skip")
    assert list(loaded.skipped) == ["a/2.png"]
    assert loaded.positions.tolist() == [0, 2]


@pytest.mark.parametrize("size", [(65000, 1), (1, 65000)])
def test_a_long_thin_image_is_refused_and_not_blown_up(size):
    """Scaled for 224 px it would be 16,640,000 x 256, 12 GiB."""
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "JPEG")
    images = [buffer.getvalue(), encoded(random_images(1)[0])]
    dataset = dlc.array_dataset(images, [0, 1], ["thin", "other"])
    with pytest.raises(ValueError, match=r"sample 'thin' .*65000.*256.*not as long and thin"):
        load_images(dataset, 224)
    loaded = load_images(dataset, 224, on_corrupt="skip")
    assert list(loaded.skipped) == ["thin"]
    assert loaded.positions.tolist() == [1]
    crops = RandomCrops(dataset, 224, seed=0)
    assert crops.crop(decode(images[0], "thin"), 0, 0).shape == (224, 224, 3)


def test_memory_that_does_not_suffice_is_told_by_sample(monkeypatch):
    def no_memory(transform, image, image_size):
        raise MemoryError

    monkeypatch.setattr("dlc_jax.preprocess.transform.Transform.__call__", no_memory)
    dataset = dlc.array_dataset(random_images(1), [0], ["a"])
    with pytest.raises(ValueError, match="sample 'a' cannot be used: MemoryError"):
        load_images(dataset, 32)


def test_no_other_program_is_asked_to_read_an_image():
    """PIL hands EPS to Ghostscript, where there is one."""
    eps = io.BytesIO()
    Image.fromarray(random_images(1)[0]).save(eps, "EPS")
    with pytest.raises(ValueError, match="sample 'x' is not a readable image: Unidentified"):
        decode(eps.getvalue(), "x")


def test_a_class_that_loses_its_last_sample_is_named(sample_encoder, small_sample):
    images = [small_sample[i].image for i in range(60)]
    images[4:8] = [b"broken"] * 4
    broken = dlc.Dataset(images, small_sample.labels, small_sample.ids, small_sample.class_names)
    with pytest.raises(ValueError, match=r"'butterfly'.*skipped samples do not count"):
        dlc.probe(sample_encoder, dlc.Images(broken, on_corrupt="skip"), image_size=64)
    nothing = dlc.array_dataset([b"x"] * 60, small_sample.labels)
    with pytest.raises(ValueError, match="none of its 60 images is readable"):
        load_images(nothing, 64, on_corrupt="skip")


def test_each_image_is_read_twice_for_scoring_and_once_with_the_cache(
    small_sample, sample_encoder, tmp_path
):
    reads = []

    class Counting:
        def __len__(self):
            return len(small_sample)

        def __getitem__(self, position):
            reads.append(position)
            return small_sample.images[position]

    counted = dlc.Dataset(
        Counting(), small_sample.labels, small_sample.ids, small_sample.class_names
    )
    options = {"image_size": 32, "num_probes": 3}
    streamed = dlc.probe(sample_encoder, counted, **options)
    assert sorted(reads) == sorted([*range(60)] * 2)
    assert counted.fingerprint  # reads, but does not decode, everything
    reads.clear()
    cache = dlc.ImageCache(str(tmp_path))
    cached = dlc.probe(sample_encoder, dlc.Images(counted, cache=cache), **options)
    assert sorted(reads) == list(range(60))
    np.testing.assert_array_equal(cached.losses, streamed.losses)
    reads.clear()
    dlc.features(sample_encoder, dlc.Images(counted, cache=cache), image_size=32)
    assert not reads


def boxes(num: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.array([random_box(generator, height, width) for _ in range(num)])


@pytest.mark.parametrize(("height", "width"), [(80, 120), (120, 80), (50, 400)])
def test_random_boxes_follow_torchvisions_distribution(timm, height, width):
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    left, top, right, bottom = boxes(3000, height, width).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


def real_images(sample) -> list[Image.Image]:
    """Fifty photographs: small, large, portrait and landscape."""
    images = [decode(sample[i].image, "x") for i in range(0, 750, 15)]
    enlarged = [image.resize((image.width * 6, image.height * 6)) for image in images[:10]]
    portrait = [image.transpose(Image.Transpose.ROTATE_90) for image in images[10:20]]
    small = [image.resize((image.width // 4, image.height // 4)) for image in images[20:25]]
    strips = [image.crop((0, 30, image.width, 45)) for image in images[25:30]]
    return enlarged + portrait + small + strips + images[30:]


@pytest.mark.parametrize("image_size", [64, 224])
def test_crops_are_torchvisions_given_box_and_flip(timm, sample, image_size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    generator = np.random.default_rng(image_size)
    images = real_images(sample)
    assert len(images) == 50
    assert {image.height > image.width for image in images} == {False, True}
    for number, image in enumerate(images):
        left, top, right, bottom = box = random_box(generator, image.height, image.width)
        flip = bool(number % 2)
        theirs = vision.resized_crop(
            image,
            top,
            left,
            bottom - top,
            right - left,
            [image_size, image_size],
            InterpolationMode.BILINEAR,
            antialias=True,
        )
        theirs = np.asarray(vision.hflip(theirs) if flip else theirs)
        np.testing.assert_array_equal(resized_crop(image, box, flip, image_size), theirs)


def test_half_of_the_crops_are_mirrored(sample):
    """On an image that is dark on the left, a mirrored crop is brighter on the left."""
    ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    ramp = np.repeat(ramp[:, :, None], 3, axis=2)
    names = [str(i) for i in range(400)]
    dataset = dlc.array_dataset([ramp] * 400, [0, 1] * 200, ids=names)
    crops = RandomCrops(dataset, 16, seed=3)
    image = decode(ramp, "x")
    cut = np.stack([crops.crop(image, i, draw=1) for i in range(400)]).astype(int)
    mirrored = cut[:, :, :4].mean((1, 2, 3)) > cut[:, :, -4:].mean((1, 2, 3))
    assert 165 < mirrored.sum() < 235


def test_crops_depend_on_seed_sample_and_draw_alone(small_sample):
    crops = RandomCrops(small_sample, 32, seed=1)
    positions = np.arange(6)
    originals = [decode(small_sample[i].image, "x") for i in range(6)]
    first = crops.cut(originals, positions, draw=0)
    np.testing.assert_array_equal(first[2:], crops.cut(originals[2:], positions[2:], draw=0))
    assert np.any(first != crops.cut(originals, positions, draw=1))
    other = RandomCrops(small_sample, 32, seed=2)
    assert np.any(first != other.cut(originals, positions, draw=0))
    assert first.shape == (6, 32, 32, 3)


def test_png_and_array_of_the_same_pixels_load_the_same():
    pixels = random_images(3, 50)
    from_files = load_images(dlc.array_dataset([encoded(p) for p in pixels], [0, 1, 0]), 32)
    from_arrays = load_images(dlc.array_dataset(pixels, [0, 1, 0]), 32)
    np.testing.assert_array_equal(from_files.pixels, from_arrays.pixels)
