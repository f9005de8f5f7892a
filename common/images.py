"""Encoded image bytes to upright RGB pixels, and those to a model's square: the same way everywhere."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

if TYPE_CHECKING:  # the decoding child process imports this file and must start without pydantic
    from common.models.spec import Geometry

MAX_PIXELS = 100_000_000
# Left out: what Pillow hands to external programs (EPS, WMF), scientific stubs, formats nobody publishes figures in.
FORMATS = (
    *("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000", "AVIF"),
    *("DIB", "PPM", "PSD", "ICO", "QOI", "SGI", "PCX", "TGA"),
)
# A strip resized to this many squares is cropped while it is resized: a 1 x 30000 picture would need gigabytes.
LONGEST_STRIP = 32
# What Pillow's decoders raise on damaged input, found by feeding them damaged input; MemoryError is the caller's.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
Resize = Callable[[Image.Image, tuple[int, int], Image.Resampling], Image.Image]
"""Makes a picture so wide and high, through a filter."""
_PROBES = 8
"""Pixels along the diagonal that are looked at before a whole picture is compared."""
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImageError(Exception):
    """Bytes that do not become a picture.

    Attributes:
        reason: A short category that can be counted: empty file, not an image, too many pixels, truncated, damaged,
            non-finite pixels, unsupported mode.
        detail: What happened to this one file.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS, least_side: int | None = None) -> Image.Image:
    """Decode a picture to upright 8-bit RGB.

    The first frame is taken; EXIF orientation is applied; transparency is laid over white; CMYK goes through the
    embedded ICC profile if there is one; integer and float modes deeper than 8 bits are stretched from their least
    to their greatest value. Profiles of RGB and gray pictures are ignored, as all CLIP training pipelines do.

    Args:
        data: An encoded file in one of ``FORMATS``.
        max_pixels: Limit on width times height, read from the header before anything is decoded.
        least_side: A JPEG may come out at a half, a quarter or an eighth of its size, as long as both sides keep this
            many pixels: the decoder then skips most of its work, and pixels differ a little from those of the whole.

    Raises:
        UndecodableImageError: The bytes are not a whole picture within the limit.
        MemoryError: There is not enough memory.
    """
    if not data:
        raise UndecodableImageError("empty file", "the file has no bytes")
    with _quiet_pillow:
        image = _open(data, max_pixels)
        try:
            if least_side is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, _draft_size(image.size, least_side))
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
        except _DECODER_ERRORS as error:
            raise _explain(error) from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _draft_size(size: tuple[int, int], least_side: int) -> tuple[int, int]:
    """What to ask Pillow's JPEG decoder for: it never gives less than either number."""
    scale = least_side / min(size)
    return (least_side, least_side) if scale >= 1 else (int(size[0] * scale), int(size[1] * scale))


def pillow_resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resize as every CLIP's own code does."""
    return image.resize(size, resample)


class ExactResize:
    """:func:`pillow_resize` for one picture and its many sizes.

    It resizes each channel on its own, so of a picture whose three are equal, as those of most radiographs are, one is
    resized: the same pixels in half the time.
    """

    def __init__(self) -> None:
        self._looked = False
        self._channel: Image.Image | None = None

    def __call__(self, image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """See :func:`pillow_resize`; ``image`` is the same in every call."""
        if not self._looked:
            self._looked, self._channel = True, only_channel(image)
        if self._channel is None:
            return pillow_resize(image, size, resample)
        return Image.merge("RGB", [pillow_resize(self._channel, size, resample)] * 3)


def only_channel(image: Image.Image) -> Image.Image | None:
    """The channel of an RGB picture whose three are equal; None for any other."""
    if image.mode != "RGB":
        return None
    width, height = image.size
    for place in range(1, 2 * _PROBES, 2):  # nearly all pictures with colours end here
        red, green, blue = image.getpixel((width * place // (2 * _PROBES), height * place // (2 * _PROBES)))  # type: ignore[misc]
        if not red == green == blue:
            return None
    first, *others = image.split()
    if any(ImageChops.difference(first, other).getbbox() for other in others):
        return None
    return first


def each_once(resize: Resize) -> Resize:
    """For the geometries of one picture: those that want the same size share it. A square is the same to most."""
    made: dict[tuple[tuple[int, int], Image.Resampling], Image.Image] = {}

    def shared(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        if (size, resample) not in made:
            made[size, resample] = resize(image, size, resample)
        return made[size, resample]

    return shared


def fit(image: Image.Image, geometry: Geometry, resize: Resize | None = None) -> np.ndarray:
    """Resize and crop an upright RGB picture exactly as open_clip (or transformers, or MedCLIP) would.

    Only strips longer than ``LONGEST_STRIP`` times their width may differ, in the last bit of a few pixels, and padded
    squares of more than ``MAX_PIXELS``, by half a pixel.

    Args:
        image: The picture.
        geometry: What to make of it.
        resize: How to resize; None for an :class:`ExactResize` of this picture's own. Gray and padded squares are
            resized by Pillow all the same.

    Returns:
        uint8 [size, size, channels]
    """
    if geometry.colour == "gray":
        return _square(image.convert("L"), geometry, pillow_resize)[:, :, None]
    return _square(image, geometry, resize or ExactResize())


def _square(image: Image.Image, geometry: Geometry, resize: Resize) -> np.ndarray:
    size, resample = geometry.size, Image.Resampling[geometry.interpolation.upper()]
    if geometry.resize == "squash":
        return np.array(resize(image, (size, size), resample))
    if geometry.resize == "pad-square":
        return _padded_first(image, size, resample)
    if geometry.resize == "longest":
        longest = max(image.size)
        # Divided twice, as open_clip does: multiplying by size / longest rounds differently.
        width, height = (max(1, round(side / (longest / size))) for side in image.size)
        square = Image.new(image.mode, (size, size))
        whole = resize(image, (width, height), resample)
        square.paste(whole, ((size - width) // 2, (size - height) // 2))
        return np.array(square)
    width, height = _shortest(image.size, max(size, geometry.resize_to or size))
    left, top = (_margin(side - size, geometry.crop_rounding) for side in (width, height))
    if max(width, height) > LONGEST_STRIP * size:
        scale_x, scale_y = image.width / width, image.height / height
        box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
        return np.array(image.resize((size, size), resample, box=box))
    whole = resize(image, (width, height), resample)
    return np.array(whole.crop((left, top, left + size, top + size)))


def _padded_first(image: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    """Centred on a black square that holds it and is no smaller than ``size``, then resized (MedCLIP, dataset.py)."""
    side = max(size, *image.size)
    if side * side > MAX_PIXELS:
        # The square of a long strip would need gigabytes: only the strip is resized, at most half a pixel off.
        scale = size / side
        width, height = (max(1, round(length * scale)) for length in image.size)
        square = Image.new(image.mode, (size, size))
        square.paste(image.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
        return np.array(square)
    square = Image.new(image.mode, (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.array(square.resize((size, size), resample))


def _shortest(source: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height after the short side became ``size``; the long side is cut, not rounded (torchvision)."""
    width, height = source
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _margin(leftover: int, rounding: str) -> int:
    return leftover // 2 if rounding == "floor" else round(leftover / 2.0)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UndecodableImageError(
            "not an image", f"no decoder recognises the {len(data)} bytes (accepted: {', '.join(FORMATS)})"
        ) from error
    except _DECODER_ERRORS as error:
        raise _explain(error) from error
    if image.width * image.height > max_pixels:
        raise UndecodableImageError(
            "too many pixels", f"{image.width} x {image.height} is more than the limit of {max_pixels} pixels"
        )
    return image


def _explain(error: Exception) -> UndecodableImageError:
    if isinstance(error, UndecodableImageError):
        return error
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        return UndecodableImageError("too many pixels", str(error))
    if "out of memory" in str(error):  # how Pillow reports a failed allocation inside a decoder
        raise MemoryError(str(error)) from error
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return UndecodableImageError("truncated", detail)
    return UndecodableImageError("damaged", detail)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS:
        return 1  # damaged metadata beside whole pixels: nothing says that the picture lies on its side


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_MODES:
        return _window(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _over_white(image)
    if image.mode == "CMYK":
        return _through_profile(image, image.info.get("icc_profile"))
    if image.mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return _transformed(image, lab, srgb)
    if image.mode in ("1", "L", "P", "YCbCr", "HSV", "RGBX"):
        return image.convert("RGB")
    raise UndecodableImageError("unsupported mode", f"pictures of mode {image.mode} have no known colours")


def _window(image: Image.Image) -> Image.Image:
    """Stretch deep pixels from least to greatest over 0..255; a constant picture becomes black."""
    deep = np.asarray(image)
    if not np.isfinite(deep).all():
        count = int(deep.size - np.isfinite(deep).sum())
        raise UndecodableImageError("non-finite pixels", f"{count} of {deep.size} pixels are NaN or infinite")
    low, high = float(deep.min()), float(deep.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    gray = np.empty(deep.shape, np.uint8)
    for start in range(0, len(deep), 256):  # in bands: a float64 copy of the whole would be eight times the result
        band = deep[start : start + 256].astype(np.float64)
        gray[start : start + 256] = np.rint((band - low) * scale)
    return Image.fromarray(gray).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(rgba, mask=rgba.getchannel("A"))
    return rgb


def _through_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return _transformed(image, source, ImageCms.createProfile("sRGB"))
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that does not fit the pixels says nothing; the plain formula still does
    return image.convert("RGB")


def _transformed(image: Image.Image, source: object, target: object) -> Image.Image:
    done = ImageCms.profileToProfile(image, source, target, outputMode="RGB")  # type: ignore[arg-type]
    assert done is not None, "profileToProfile returns None only when it works in place"
    return done


class _QuietPillow:
    """Silence Pillow's warnings while at least one thread decodes.

    They are about metadata and sizes this file checks itself, and with ``-W error`` they would decide what is a
    picture. ``warnings.catch_warnings`` alone would leak its filter when threads leave in another order than they came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()
