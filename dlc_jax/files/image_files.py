"""Image files as Pillow opens them: formats, suffixes, and how many bits a channel has."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

# Of photographs and drawings. PIL would take others, too, and hand an EPS file to Ghostscript.
_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".gif", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif",
)  # fmt: skip
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
NEEDS_HEIF = "HEIC and HEIF are read where pillow-heif is installed"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ALWAYS_8_BITS = (b"\xff\xd8", b"GIF8", b"RIFF", b"BM")  # JPEG, GIF, WebP, BMP


@functools.cache
def reads_heif() -> bool:
    """Whether `pillow_heif` is installed, which teaches Pillow to open HEIC."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def suffixes() -> tuple[str, ...]:
    """Returns the lower-case suffixes of the image files that can be read here."""
    return SUFFIXES + (HEIF_SUFFIXES if reads_heif() else ())


def opened(image: bytes) -> Image.Image:
    """Returns the image, not decoded yet; PIL's errors if the bytes are none."""
    is_heif = _is_heif(image)
    if is_heif and not reads_heif():
        raise ValueError(f"a HEIF image; {NEEDS_HEIF}")
    return Image.open(io.BytesIO(image), formats=("HEIF",) if is_heif else _FORMATS)


def _is_heif(image: bytes) -> bool:
    """Whether the file is of HEIF's brands and not of AVIF's, which Pillow reads itself."""
    if image[4:8] != b"ftyp" or image[8:12] not in _HEIF_BRANDS:
        return False
    brands = image[8 : int.from_bytes(image[:4], "big")]
    return b"avif" not in brands and b"avis" not in brands


def bits_per_channel(image: Image.Image, content: bytes) -> int:
    """Returns the stored bits of the deepest channel, 8 if it has fewer.

    Pillow reads several deep formats as 8 bits, without saying so: its mode does not suffice.

    Args:
      image: As `opened` gives it.
      content: The file it is of.
    """
    bits = {"I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
    if image.format == "PNG":
        bits = content[24]
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (bits,)))  # type: ignore[attr-defined]
    elif image.format == "PPM" and image.mode != "F":
        bits = max(bits % 32, _maximum(image).bit_length())
    elif image.format == "JPEG2000":
        bits = _jpeg2000_bits(content)
    elif image.format == "AVIF":
        bits = avif_bits(content)
    elif image.format == "HEIF":
        bits = image.info.get("bit_depth", 8)
    return max(bits, 8)


def depth(image: bytes | np.ndarray) -> str | None:
    """Returns the depth of an image in words; None if it has at most 8 bits or is no image."""
    if isinstance(image, np.ndarray):
        return None if image.dtype == np.uint8 else f"numbers of {image.dtype}"
    if image.startswith(_ALWAYS_8_BITS):
        return None
    try:
        with opened(image) as encoded:
            bits = bits_per_channel(encoded, image)
    except Exception:  # PIL's decoders raise anything; whether it matters is for `decode` to say
        return None
    return f"{bits} bits a channel" if bits > 8 else None


def _maximum(image: Image.Image) -> int:
    """Returns the largest value that a PPM file declares."""
    args = image.tile[0].args  # type: ignore[attr-defined]
    if image.tile[0].codec_name == "raw":  # type: ignore[attr-defined]
        return 65535 if image.mode == "I" else 255
    return int(args[1]) if isinstance(args, tuple) else 255


def _jpeg2000_bits(content: bytes) -> int:
    """Reads the components' precision in the SIZ segment; 8 if there is none.

    Source: ISO/IEC 15444-1, A.5.1.
    """
    start = content.find(b"\xff\x4f\xff\x51")
    size = content[start:][: 42 + 3 * 4]  # precision, dx and dy of four components
    if start < 0 or len(size) < 43:
        return 8
    num = min(int.from_bytes(size[40:42], "big"), 4)
    return max(((part & 0x7F) + 1 for part in size[42 : 42 + 3 * num : 3]), default=8)


def avif_bits(content: bytes) -> int:
    """Reads the depth in the first `av1C` box; 8 if there is none.

    Source: AV1 Codec ISO Media File Format Binding, 2.3.3.
    """
    start = content.find(b"av1C")
    flags = content[start + 6] if 0 <= start < len(content) - 6 else 0
    if not flags & 0x40:
        return 8
    return 12 if flags & 0x20 else 10
