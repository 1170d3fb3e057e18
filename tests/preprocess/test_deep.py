"""More than 8 bits a channel: refused, or brought to 8 as `deep_images` says."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from conftest import encoded, random_images
from PIL import Image

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.files.image_files import avif_bits, depth
from dlc_jax.preprocess.decode import decode
from dlc_jax.preprocess.images import load_images
from dlc_jax.preprocess.inspection import inspect

H, W = 6, 5


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits: grey, grey and alpha, RGB or RGBA by the channels of [h, w, c]."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def tiff(
    values: np.ndarray,
    *,
    bits: int = 16,
    photometric: int = 1,
    planar: int = 1,
    deflated: bool = False,
) -> bytes:
    """A TIFF of one strip, in the byte order and of the kind of the values."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = zlib.compress(values.tobytes()) if deflated else values.tobytes()
    height, width, channels = values.shape
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels),
        (259, 3, [8 if deflated else 1]), (262, 3, [photometric]), (273, 4, [0]),
        (277, 3, [channels]), (278, 4, [height]), (279, 4, [len(data)]), (284, 3, [planar]),
        (339, 3, [form] * channels),
    ]  # fmt: skip
    sizes = {3: "H", 4: "I"}
    packed = [struct.pack(order + sizes[kind] * len(v), *v) for _, kind, v in entries]
    apart = 8 + 2 + 12 * len(entries) + 4
    start = apart + sum(len(value) for value in packed if len(value) > 4)
    head, rest = b"", b""
    for (tag, kind, content), value in zip(entries, packed, strict=True):
        if tag == 273:
            value = struct.pack(order + "I", start)
        if len(value) > 4:
            value, rest = struct.pack(order + "I", apart + len(rest)), rest + value
        head += struct.pack(order + "HHI", tag, kind, len(content)) + value.ljust(4, b"\0")
    mark = b"MM" if order == ">" else b"II"
    count = struct.pack(order + "H", len(entries))
    return mark + struct.pack(order + "HI", 42, 8) + count + head + bytes(4) + rest + data


def values(channels: int, kind: str = "u2", low: int = 0, high: int = 65536) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (H, W, channels)).astype(kind)


def pgm(maximum: int, channels: int = 1) -> tuple[bytes, np.ndarray]:
    pixels = values(channels, ">u2", high=maximum + 1)
    pixels.flat[0], pixels.flat[1] = 0, maximum
    head = b"P%d %d %d %d\n" % (5 if channels == 1 else 6, W, H, maximum)
    return head + pixels.tobytes(), pixels.astype(float) / maximum


def twelve_bits() -> tuple[bytes, np.ndarray]:
    """Pairs of pixels in three bytes."""
    pixels = values(1, high=4096)[:, :4]
    first, second = pixels[:, 0::2, 0], pixels[:, 1::2, 0]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    strip = packed.astype(np.uint8).reshape(H, 6, 1)
    content = tiff(strip, bits=12)
    width = content.index(struct.pack("<HHI", 256, 4, 1)) + 8
    return content[:width] + struct.pack("<I", 4) + content[width + 4 :], pixels / 4095


def jpeg2000() -> tuple[bytes, np.ndarray]:
    grey = values(1)[:, :, 0]
    buffer = io.BytesIO()
    Image.fromarray(np.tile(grey, (8, 8))).save(buffer, "JPEG2000", irreversible=False)
    return buffer.getvalue(), np.tile(grey, (8, 8))[:, :, None] / 65535


def deep_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files, and their colours as shares of the largest value of their bits, [h, w, 1 or 3]."""
    found = {
        f"png of {c}": (png(values(c)), values(c)[:, :, : 3 if c > 2 else 1] / 65535)
        for c in (1, 2, 3, 4)
    }
    for order in "<>":
        grey = values(1, order + "u2")
        found[f"tiff grey {order}"] = tiff(grey), grey / 65535
        rgb = values(3, order + "u2")
        found[f"tiff rgb {order}"] = tiff(rgb, photometric=2), rgb / 65535
        found[f"tiff rgb deflated {order}"] = (
            tiff(rgb, photometric=2, deflated=True), rgb / 65535,
        )  # fmt: skip
        rgba = values(4, order + "u2")
        found[f"tiff rgba {order}"] = tiff(rgba, photometric=2), rgba[..., :3] / 65535
        signed = values(1, order + "i2", high=32768)
        found[f"tiff signed 16 {order}"] = tiff(signed), signed / 32767
        signed = values(1, order + "i4", high=2**31)
        found[f"tiff signed 32 {order}"] = tiff(signed, bits=32), signed / (2**31 - 1)
        floats = np.random.default_rng(0).random((H, W, 1)).astype(order + "f4")
        found[f"tiff float {order}"] = tiff(floats, bits=32), floats.astype(float)
    unsigned = values(1, "<u4", high=2**32)
    found["tiff unsigned 32"] = tiff(unsigned, bits=32), unsigned / (2**32 - 1)
    found["tiff 0 is white"] = tiff(values(1), photometric=0), 1 - values(1) / 65535
    found["tiff 12"] = twelve_bits()
    found |= {f"pgm {maximum}": pgm(maximum) for maximum in (1023, 65535)}
    found["jpeg 2000"] = jpeg2000()
    return found


FILES = deep_files()


@pytest.mark.parametrize("name", FILES)
def test_deep_files_are_refused_by_name_or_scaled(name):
    content, shares = FILES[name]
    with pytest.raises(dlc.InputError, match=r"'x\.png' has \d\d bits a channel.*full_range.*clip"):
        decode(content, "x.png")
    shares = np.broadcast_to(shares, (*shares.shape[:2], 3))
    whole = np.asarray(decode(content, "x", "full_range"), float)
    near = 0.51 if not name.startswith("pgm") else 0.6  # Pillow rounds the values of a PGM before
    assert np.abs(whole - shares * 255).max() <= near
    stretched = np.asarray(decode(content, "x", "min_max"), float)
    expected = (shares - shares.min()) / (shares.max() - shares.min()) * 255
    assert np.abs(stretched - expected).max() <= near
    clipped = np.asarray(decode(content, "x", "clip"))
    np.testing.assert_array_equal(
        clipped, np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    )
    assert depth(content)


def test_files_that_pillow_gives_8_bits_of_are_scaled_by_it_or_refused():
    for maximum in (1023, 65535):
        content, shares = pgm(maximum, 3)
        found = np.asarray(decode(content, "x", "full_range"), float)
        assert np.abs(found - shares * 255).max() <= 0.51
        with pytest.raises(dlc.InputError, match="Pillow gives 8 in PPM, too few.*full_range"):
            decode(content, "x", "min_max")
    planes = tiff(values(3), photometric=2, planar=2)
    for how in ("full_range", "min_max"):
        with pytest.raises(dlc.InputError, match="separate planes"):
            decode(planes, "x", how)


def test_depth_is_read_where_pillow_does_not_tell_it():
    pixels = random_images(1, 16)[0]
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "PPM", "BMP", "JPEG2000", "AVIF"):
        assert depth(encoded(pixels, kind)) is None, kind
    for mode in ("1", "L", "P", "LA", "RGBA"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
        assert not depth(buffer.getvalue()), mode
    assert not depth(b"no image")
    content = bytearray(encoded(pixels, "AVIF"))
    assert avif_bits(bytes(content)) == 8
    content[content.index(b"av1C") + 6] |= 0x40
    assert avif_bits(bytes(content)) == 10
    content[content.index(b"av1C") + 6] |= 0x20
    assert avif_bits(bytes(content)) == 12
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000")
    deep = bytearray(buffer.getvalue())
    start = deep.index(b"\xff\x4f\xff\x51") + 42
    deep[start], deep[start + 3], deep[start + 6] = 15, 15, 15  # 16 bits of each channel
    with pytest.raises(dlc.InputError, match="has 16 bits a channel"):
        decode(bytes(deep), "x")


@pytest.mark.parametrize("shape", [(H, W), (H, W, 1), (H, W, 3)])
def test_arrays_of_other_numbers(shape):
    generator = np.random.default_rng(0)
    for kind, top in (("u2", 65535), ("i2", 32767), ("u4", 2**32 - 1), ("i8", 2**63 - 1)):
        array = generator.integers(0, top, shape, dtype=kind, endpoint=True)
        found = np.asarray(decode(array, "x", "full_range"), float)
        shares = np.broadcast_to(array.reshape(H, W, -1) / top, (H, W, 3))
        assert np.abs(found - shares * 255).max() <= 0.51
        with pytest.raises(dlc.InputError, match=rf"sample 'x' .*{array.dtype}.*min_max"):
            decode(array, "x")
    floats = generator.random(shape).astype(np.float32)
    found = np.asarray(decode(floats, "x", "full_range"), float)
    assert np.abs(found - floats.reshape(H, W, -1) * 255).max() <= 0.51
    small = (floats * 3).astype(np.float64) - 1
    found = np.asarray(decode(small, "x", "min_max"), float)
    expected = (small - small.min()) / np.ptp(small) * 255
    assert np.abs(found - expected.reshape(H, W, -1)).max() <= 0.51
    clipped = decode(floats * 1000, "x", "clip")
    expected = np.clip(floats * 1000, 0, 255).astype(np.uint8).reshape(H, W, -1)
    np.testing.assert_array_equal(np.asarray(clipped), np.broadcast_to(expected, (H, W, 3)))


def test_values_that_a_choice_does_not_fit_are_named():
    floats = np.full((H, W, 1), 0.5, np.float32)
    floats[0, 0], floats[1, 1] = 0, 1.5
    for bad, says in (
        (tiff(floats, bits=32), r"'x' has values from 0 to 1\.5, .*expects 0\.\.1; choose min_max"),
        (tiff(values(1, "i2", low=-5, high=9)), r"values from -\d to .*expects 0\.\.32767"),
        (floats[:, :, 0], r"values from 0 to 1\.5"),
        (np.full((H, W), -1, np.int16), r"values from -1 to -1"),
    ):
        with pytest.raises(dlc.InputError, match=says):
            decode(bad, "x", "full_range")
    floats[2, 2] = np.nan
    for how in ("full_range", "min_max"):
        for bad in (tiff(floats, bits=32), floats):
            with pytest.raises(dlc.InputError, match="'x' .*pixels that are not finite"):
                decode(bad, "x", how)


def test_a_range_beyond_float64_is_refused_by_name():
    for values in ([-1.7e308, 1.7e308], [0, 5e-324]):
        with pytest.raises(dlc.InputError, match="sample 'x' .* range that float64 can hold"):
            decode(np.array([values]), "x", "min_max")


def test_channels_first_are_refused_with_what_is_expected():
    with pytest.raises(
        dlc.InputError, match=r"sample 'x' .*expected uint8 .*found uint8 \(3, 8, 9"
    ):
        decode(np.zeros((3, 8, 9), np.uint8), "x")


def mixed(deep_images: str = "error") -> dlc.Dataset:
    """Four samples, of which one is deep, one deep and constant and one broken."""
    constant = png(np.full((H, W, 1), 40000))
    files = [encoded(random_images(1, 40)[0]), FILES["png of 3"][0], constant, b"no image"]
    return dlc.array_dataset(
        files, [0, 1, 0, 1], ["flat", "deep", "even", "bad"], deep_images=deep_images
    )


def test_a_deep_image_is_not_skipped_as_corrupt():
    for on_corrupt in ("error", "skip"):
        with pytest.raises(dlc.InputError, match=r"^arrays: sample 'deep' has 16 bits a channel"):
            load_images(mixed(), 32, on_corrupt=on_corrupt)
    loaded = load_images(mixed("full_range"), 32, on_corrupt="skip")
    assert list(loaded.skipped) == ["bad"]


def test_a_constant_image_becomes_mid_grey_and_is_told(tmp_path):
    cache = dlc.ImageCache(str(tmp_path))
    for _ in range(2):  # decoded, and from the cache
        dataset = mixed("min_max")
        part = dataset.subset(np.arange(4))  # which tells the whole
        loaded = load_images(part, 32, on_corrupt="skip", cache=cache)
        assert np.all(loaded.pixels[2] == 128)
        assert dataset.mid_grey == {"even"}


def test_the_choice_is_in_the_fingerprint_and_the_cache_where_it_changes_pixels(tmp_path):
    cache = dlc.ImageCache(str(tmp_path))
    choices = ("error", "full_range", "min_max", "clip")
    pixels = {}
    for how in choices[1:]:
        loaded = load_images(mixed(how).subset(np.arange(2)), 32, cache=cache)
        pixels[how] = loaded.pixels[1].tobytes()
    assert len(set(pixels.values())) == 3
    with pytest.raises(dlc.InputError, match="'deep'"):
        load_images(mixed().subset(np.arange(2)), 32, cache=cache)
    assert len({mixed(how).fingerprint for how in choices}) == 4
    assert len({mixed(how).subset(np.array([0, 3])).fingerprint for how in choices}) == 1
    images = np.arange(2 * H * W, dtype=np.uint16).reshape(2, H, W)
    assert (
        dlc.array_dataset(images, [0, 1], ["a", "b"]).fingerprint
        != dlc.array_dataset(images.view(np.int16), [0, 1], ["a", "b"]).fingerprint
    )


def test_sources_and_settings_hand_the_choice_on(tmp_path):
    for name, content in (("a/1.png", FILES["png of 1"][0]), ("b/2.png", FILES["png of 3"][0])):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    for source in (f"folder:{tmp_path}", f"split:100/0:train:folder:{tmp_path}"):
        dataset = dlc.load_dataset(source, deep_images="full_range")
        assert len(load_images(dataset, 32).pixels) == len(dataset)
        with pytest.raises(dlc.InputError, match="has 16 bits a channel"):
            load_images(dlc.load_dataset(source), 32)
    with pytest.raises(dlc.InputError, match="deep_images.*Did you mean 'min_max'"):
        dlc.load_dataset(source, deep_images="minmax")
    np.savez(tmp_path / "x.npz", images=values(1)[None, :, :, 0].repeat(2, 0), labels=[0, 1])
    dataset = dlc.load_dataset(f"npz:{tmp_path}/x.npz", deep_images="full_range")
    assert np.asarray(decode(dataset[0].image, "x", "full_range")).max() > 200
    with pytest.raises(dlc.InputError, match="uint16.*full_range"):
        load_images(dlc.load_dataset(f"npz:{tmp_path}/x.npz"), 32)


def test_the_mode_decides_unless_the_setting_does():
    def resolved(mode: str, choice: str | None) -> str | None:
        values = {"mode": mode, "stages": ("select",), "dataset": {"deep_images": choice}}
        return Config.of(values).dataset.deep_images

    assert resolved("default", None) == "error"
    assert resolved("official", None) == "clip"
    assert resolved("official", "error") == "error"
    assert resolved("default", "min_max") == "min_max"
    with pytest.raises(dlc.InputError, match="dataset.deep_images: unknown value"):
        Config.of(
            {"dataset": {"train": "folder:x", "deep_images": "max"}, "encoder": {"weights": "x"}}
        )


def test_the_check_lists_them():
    found = inspect(mixed(), minimum=1)
    assert found.deep == {"deep": "16 bits a channel", "even": "16 bits a channel"}
    assert list(found.unreadable) == ["bad"]
    assert not found.is_clean
    assert json.dumps(found.to_dict())
    decided = inspect(mixed("min_max"), minimum=1)
    assert decided.deep == {}
    assert list(decided.unreadable) == ["bad"]
    assert decided.mid_grey == ["even"]
