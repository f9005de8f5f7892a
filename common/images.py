"""Encoded image bytes to upright RGB pixels, and those to a model's square: the same way everywhere."""

from __future__ import annotations

import io
import re
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, UnidentifiedImageError

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
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Byte order of 16-bit samples -> the order that makes Pillow, which keeps the upper byte of each, keep the lower."""
_CUT_OFF = ("truncated", "not enough image data", "smaller than requested size", "not enough data")
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_PLANES, _PALETTE, _SAMPLE_FORMAT = 284, 320, 339
"""TIFF tags."""
_PCX_PALETTE, _PCX_GRAY = 12, 2
"""What stands before the palette at the end of a PCX, and in the header of one that needs none."""
_ABOUT_METADATA = re.compile(r"MAX_TEXT_|in [iz]\w{3} chunk")
"""What Pillow says of a PNG whose texts or colour profile it refuses, for their size or their compression."""
_BAD_METADATA = "unreadable metadata"
_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {
    "PNG": re.escape(_PNG),
    "JPEG-LS": rb"\xff\xd8\xff\xf7",
    "JPEG": rb"\xff\xd8\xff",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "JPEG XR": rb"II\xbc\x01",
    "WEBP": rb"RIFF....WEBP",
    "PSD": rb"8BPS\0\x01",
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ",
    "AVIF": rb"....ftypavi[fs]",
    "QOI": rb"qoif",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "DIB": rb"[\x28\x34\x38\x40\x6c\x7c]\0{3}.{8}\x01\0",
    "ICO": rb"\0\0\x01\0",
    "SGI": rb"\x01\xda[\0\x01][\x01\x02]",
    "PCX": rb"\n[\0\x02\x03\x05]\x01",
    "PAM": rb"P7\s",
    "PPM": rb"P[1-6Ff]\s+(#[^\n]*\n\s*)*\d+\s",
    "DICOM": rb".{128}DICM",
    "HEIC": rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<[?!]((?!<html).){,2000})?<(\w+:)?svg\b",
    "PDF": rb"%PDF-",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "EMF": rb"\x01\0\0\0.{36} EMF",
    "FLI": rb".{4}[\x11\x12]\xaf",
    "DDS": rb"DDS ",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "HDR": rb"#\?(RADIANCE|RGBE)\s",
    "FITS": rb"SIMPLE  =",
    "NIfTI": rb".{344}(n\+1|ni1)\0",
    "NRRD": rb"NRRD000",
    "HDF5": rb"\x89HDF\r\n\x1a\n",
    "DjVu": rb"AT&TFORM",
    "ICNS": rb"icns",
    "XCF": rb"gimp xcf",
    "CUR": rb"\0\0\x02\0",
}
"""Format, named as in FORMATS where it is there -> what its files look like, from the first byte on."""
_UNSUPPORTED = re.compile("unknown pixel mode|cannot handle|unsupported|unknown (PCX|TGA) mode", re.IGNORECASE)
"""What Pillow says of a file that is whole, but of a kind that it cannot read."""
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
        reason: A short category that can be counted: empty file, not an image, unsupported format: and its name, too
            many pixels, truncated, damaged, unreadable metadata, non-finite pixels, unsupported mode.
        detail: What happened to this one file.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS, least_side: int | None = None) -> Image.Image:
    """Decode a picture to upright 8-bit RGB.

    The first frame is taken; EXIF orientation is applied; transparency is laid over white; CMYK goes through the
    embedded ICC profile if there is one. Profiles of RGB and gray pictures are ignored, as all CLIP training pipelines
    do.

    Pixels deeper than 8 bits follow one rule, in gray and in colours, as integers and as floats: what shows of them is
    stretched from its least to its greatest value over 0..255, with one scale for the three colours, and turned round
    where the file says that white is zero. Alpha is measured against the whole of its range. Such a picture is an
    "unsupported mode" where Pillow gives no more than its top 8 bits. Two kinds that always use the range they declare
    are not stretched but shown as they are: CMYK, and AVIF.

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
        try:
            return _decode(data, max_pixels, least_side)
        except UndecodableImageError as error:
            if error.reason != _BAD_METADATA or not data.startswith(_PNG):
                raise
        return _decode(_without_text(data), max_pixels, least_side)


def _decode(data: bytes, max_pixels: int, least_side: int | None) -> Image.Image:
    image = _open(data, max_pixels)
    try:
        if image.format in ("JPEG", "MPO"):  # first, and without the looks below: nearly all files are
            if least_side is not None:
                image.draft(None, _draft_size(image.size, least_side))
            image.load()
            rgb = _to_rgb(image)
        elif (deep := _deep_colours(image, data, max_pixels)) is not None:
            image, rgb = deep
        else:
            image = _load(image, data, max_pixels)
            if image.format in _AFTER_LOADING:
                _AFTER_LOADING[image.format](image, data)
            rgb = _to_rgb(image)
        orientation = _orientation(image)
    except _DECODER_ERRORS as error:
        raise _explain(error) from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _load(
    image: ImageFile.ImageFile, data: bytes, max_pixels: int, rawmode: str | None = None, mode: str | None = None
) -> ImageFile.ImageFile:
    """Decode the pixels, all of them: Pillow takes a PNG whose data say too early that they end for a whole one.

    A value is laid under its last pixel first, which costs next to nothing. If it still shows, another is tried: a
    pixel that shows both was never decoded.

    Args:
        image: What ``_open`` made of ``data``.
        data: The file, to open it once more.
        max_pixels: See :func:`decode_rgb`.
        rawmode: How the samples lie in the file; None for what Pillow finds.
        mode: Mode of what is returned; None for what Pillow finds.
    """
    for ground in range(2):
        if ground:
            image = _open(data, max_pixels)
        if rawmode is not None:
            image._mode = mode or image.mode
            image.tile = [
                tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *(tile.args or ())[1:]))
                for tile in image.tile
            ]
        if image.format == "PNG":
            if _covers(image, ground):
                return image
            continue
        if image.format == "PSD":
            _fence(image, data)
        image.load()
        return image
    raise UndecodableImageError("truncated", "the PNG ends before its last pixel")


def _covers(image: ImageFile.ImageFile, ground: int) -> bool:
    """Decode the pixels over a ground; whether they hide it."""
    prepare, (width, height) = image.load_prepare, image.size
    # The last pass of an interlaced picture is over the rows with odd numbers.
    skipped = bool(height % 2 and height > 1 and image.info.get("interlace"))
    last = (width - 1, height - 1 - skipped)
    value = (0, 255)[ground] if image.mode == "1" else (170, 85)[ground]  # paper is white, ink rarely in the corner
    channels = Image.getmodebands(image.mode)
    laid = (value,) * channels if channels > 1 else value

    def prepare_ground() -> None:
        prepare()
        image.im.putpixel(last, laid)

    image.load_prepare = prepare_ground  # type: ignore[method-assign]
    try:
        image.load()
    finally:
        del image.load_prepare  # it refers to the picture, which would stay in memory until garbage is collected
    return bool(image.im.getpixel(last) != laid)


def _fence(image: ImageFile.ImageFile, data: bytes) -> None:
    """Keep the decoder of a channel that ends too early from reading on in the next channel."""
    file, end = io.BytesIO(data), 0
    ends = sorted({tile.offset for tile in image.tile} | {len(data)})

    def seek(offset: int) -> None:
        nonlocal end
        end = next((later for later in ends if later > offset), offset)
        file.seek(offset)

    def read(size: int) -> bytes:
        return file.read(max(0, min(size, end - file.tell())))

    image.load_seek, image.load_read = seek, read  # type: ignore[attr-defined]


def _check_pcx(image: Image.Image, data: bytes) -> None:
    if image.mode == "L" and data[-769] != _PCX_PALETTE and data[68] != _PCX_GRAY:
        raise UndecodableImageError("truncated", "the PCX ends before its palette")


def _check_sgi(image: Image.Image, data: bytes) -> None:
    """Refuse a row that is too short: Pillow fills it up with what stands in the row before."""
    if data[2] != 1:  # not run-length encoded
        return
    rows = image.height * len(image.getbands())
    for start in set(struct.unpack_from(f">{rows}I", data, 512)):
        place, pixels = start, 0
        while pixels < image.width and (count := data[place] & 0x7F):
            pixels += count
            place += 1 + count if data[place] & 0x80 else 2
        if pixels != image.width:
            raise UndecodableImageError("damaged", f"a row of the SGI has {pixels} of {image.width} pixels")


def _use_palette_of_bytes(image: Image.Image, _: bytes) -> None:
    """Old programs wrote 8-bit colours in the 16 bits of a TIFF's palette, of which Pillow keeps the upper 8: black."""
    colours = _tiff_tags(image).get(_PALETTE)
    if image.mode == "P" and colours and max(colours) < 256:
        image.putpalette(bytes(colours), "RGB;L")


_AFTER_LOADING = {"PCX": _check_pcx, "SGI": _check_sgi, "TIFF": _use_palette_of_bytes}
"""Format -> what is done about the faults of its loaded pictures that Pillow does not mention."""


def _deep_colours(
    image: ImageFile.ImageFile, data: bytes, max_pixels: int
) -> tuple[ImageFile.ImageFile, Image.Image] | None:
    """A picture of whose colours Pillow keeps only the top 8 bits: the loaded file and its pixels; None for others.

    Its decoders are asked twice, once for either byte.
    """
    if not image.tile:
        return None
    args = image.tile[0].args
    rawmode = str(args[0]) if isinstance(args, tuple) else args or ""
    if image.format == "PNG" and ";16" not in rawmode:  # nearly all that come here
        return None
    _check_tiff(image)
    _check_depth(image, data)
    if image.format == "PPM" and _is_deep_pixmap(image):
        width, height = image.size
        samples = np.frombuffer(data, ">u2", 3 * width * height, image.tile[0].offset)
        return image, _window(samples.reshape(height, width, 3))
    if image.format not in ("PNG", "TIFF") or image.mode == "CMYK" or rawmode[-4:-1] != ";16" or rawmode[0] == "I":
        return None
    if rawmode == "LA;16B":  # as long as 8-bit RGBA
        loaded = _load(image, data, max_pixels, "RGBA", "RGBA")
        samples = np.asarray(loaded).view(">u2")
        return loaded, _window(samples[..., 0], samples[..., 1])
    kind, order = rawmode.replace("RGBa", "RGBA")[:-1], rawmode[-1]
    samples = np.asarray(_load(image, data, max_pixels, kind + order)).astype(np.uint16)
    samples <<= 8
    loaded = _load(_open(data, max_pixels), data, max_pixels, kind + _OTHER_BYTE[order])
    samples |= np.asarray(loaded)
    if image.mode == "RGB":
        return loaded, _window(samples, _alpha_of_key(samples, loaded))
    colours, alpha = samples[..., :3], samples[..., 3]
    if "RGBa" in rawmode:  # alpha was multiplied in
        for row in range(len(colours)):
            straight = colours[row].astype(np.uint32) * 65535 // np.maximum(alpha[row], 1)[:, None]
            colours[row] = np.minimum(straight, 65535)
    return loaded, _window(colours, alpha)


def _check_tiff(image: ImageFile.ImageFile) -> None:
    """Refuse a TIFF that Pillow would misread or leave half black."""
    tags, bands = _tiff_tags(image), len(image.getbands())
    if not tags:
        return
    bits, raw, planes = max(tags.get(_BITS, (1,))), tags.get(_COMPRESSION, 1) == 1, tags.get(_PLANES) == 2
    white_is_zero = tags.get(_PHOTOMETRIC, 0) == 0
    # Of the name of how the samples lie it takes a letter for each plane: "I;16" and "L;I" become others.
    if planes and (bits != 8 or white_is_zero if raw else bits > 8 and bands > 1):
        raise UndecodableImageError(
            "unsupported mode",
            f"TIFF of mode {image.mode} with {bits} bits per sample in planes (PlanarConfiguration 2); store its "
            "samples pixel by pixel, or as PNG with 8 or 16 bits",
        )
    corner = (tags[_WIDTH], tags[_HEIGHT])
    if sum((tile.extents or ())[2:] == corner for tile in image.tile) < (bands if planes and raw else 1):
        raise UndecodableImageError("truncated", f"the TIFF has strips or tiles for a part of its {corner} pixels only")


def _is_deep_pixmap(image: ImageFile.ImageFile) -> bool:
    args = image.tile[0].args
    return image.mode == "RGB" and isinstance(args, tuple) and int(args[-1]) > 255


def _check_depth(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse deep colours whose lower bits Pillow cannot be made to give."""
    bits = 8
    if image.format == "SGI":
        bits = 8 * data[3]
    elif image.format == "JPEG2000" and image.mode not in _DEEP_MODES:
        bits = (data[data.find(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1  # the first component's, in the header of sizes
    elif image.format == "PPM" and image.tile[0].codec_name == "ppm_plain" and _is_deep_pixmap(image):
        bits = 16
    if bits > 8:
        raise UndecodableImageError(
            "unsupported mode",
            f"{image.format} of mode {image.mode} with {bits} bits per sample, of which only the top 8 could be read; "
            "store it as PNG with 8 or 16 bits",
        )


def _alpha_of_key(samples: np.ndarray, image: Image.Image) -> np.ndarray | None:
    """What hides the pixels of the one colour that a PNG declares transparent."""
    key = image.info.get("transparency")
    if not isinstance(key, int | tuple):
        return None
    same = samples == np.asarray(key)
    return np.where(same.all(-1) if same.ndim == 3 else same, np.uint16(0), np.uint16(65535))


def _without_text(png: bytes) -> bytes:
    """A PNG less its texts and its colour profile, but for the texts that may say how the picture lies."""
    kept, start = [png[:8]], 8
    while start + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        chunk = png[start : start + 12 + length]
        names_orientation = chunk[8:].startswith((b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"))
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or names_orientation:
            kept.append(chunk)
        start += 12 + length
    return b"".join(kept)


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


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _unrecognised(data) from error
    except _DECODER_ERRORS as error:
        found = _explain(error)
        # Two letters make Pillow take a text for a BMP or a PPM.
        raise (_unrecognised(data) if _signature(data) is None else found) from error
    if image.width * image.height > max_pixels:
        raise UndecodableImageError(
            "too many pixels", f"{image.width} x {image.height} is more than the limit of {max_pixels} pixels"
        )
    return image


def _signature(data: bytes) -> str | None:
    return next((name for name, pattern in _SIGNATURES.items() if re.match(pattern, data[:4096], re.DOTALL)), None)


def _unrecognised(data: bytes) -> UndecodableImageError:
    """Why no decoder takes the file, as far as its first bytes tell."""
    accepted = f"accepted: {', '.join(FORMATS)}"
    name = _signature(data)
    if name is None:
        return UndecodableImageError("not an image", f"no decoder recognises the {len(data)} bytes ({accepted})")
    if name not in FORMATS:
        return UndecodableImageError(f"unsupported format: {name}", f"convert it first ({accepted})")
    what = f"it begins as {name}"
    try:
        Image.OPEN[name][0](io.BytesIO(data), "")  # Image.open drops what the plugin says
    except _DECODER_ERRORS as error:
        found = _explain(error)
        if name == "TIFF":
            layout = _tiff_layout(data)
            if layout is None:
                return UndecodableImageError("truncated", f"{what}, but ends before its directory")
            what = f"{what} of {layout}" if layout else what
        if isinstance(error.__cause__, KeyError) and name in ("PSD", "TIFF"):  # it is in no list of Pillow's
            mode = what if name == "TIFF" else f"PSD of colour mode {data[25]} with {data[23]} bits"
            return UndecodableImageError("unsupported mode", f"{mode}; store it as PNG with 8 or 16 bits")
        return UndecodableImageError(found.reason, f"{what}, but: {found.detail}")
    return UndecodableImageError("damaged", f"{what}, but its header makes no sense")


def _tiff_layout(data: bytes) -> str | None:
    """How the samples of a TIFF lie; empty if it does not say, None if it ends before it would."""
    from PIL import TiffImagePlugin

    stream = io.BytesIO(data)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(16 if data[2:3] == b"+" else 8))
        if tags.next >= len(data):
            return None
        stream.seek(tags.next)
        tags.load(stream)
        names = {
            "bits per sample": _BITS,
            "sample format": _SAMPLE_FORMAT,
            "photometric interpretation": _PHOTOMETRIC,
            "compression": _COMPRESSION,
        }
        return ", ".join(f"{name} {tags[tag]}" for name, tag in names.items() if tag in tags)
    except _DECODER_ERRORS:
        return ""


def _explain(error: Exception) -> UndecodableImageError:
    if isinstance(error, UndecodableImageError):
        return error
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        return UndecodableImageError("too many pixels", str(error))
    if "out of memory" in str(error):  # how Pillow reports a failed allocation inside a decoder
        raise MemoryError(str(error)) from error
    if _ABOUT_METADATA.search(str(error)):
        return UndecodableImageError(_BAD_METADATA, f"{error}; store the picture without it")
    if _UNSUPPORTED.search(str(error)):
        return UndecodableImageError("unsupported mode", f"{detail}; store it as PNG with 8 or 16 bits")
    if isinstance(error, EOFError) or any(words in str(error).lower() for words in _CUT_OFF):
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
        return _deep_gray(image)
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


def _tiff_tags(image: Image.Image) -> dict[int, Any]:
    return getattr(image, "tag_v2", None) or {} if image.format == "TIFF" else {}


def _deep_gray(image: Image.Image) -> Image.Image:
    values, tags = np.asarray(image), _tiff_tags(image)
    if image.mode == "I" and tags and max(tags.get(_SAMPLE_FORMAT, (1,))) == 1:
        values = values.view(np.uint32)  # Pillow has no mode for them
    return _window(values, _alpha_of_key(values, image), white_is_zero=bool(tags) and tags.get(_PHOTOMETRIC, 0) == 0)


def _window(values: np.ndarray, alpha: np.ndarray | None = None, white_is_zero: bool = False) -> Image.Image:
    """Stretch deep pixels from least to greatest over 0..255, as :func:`decode_rgb` says; of a constant, each is least.

    Args:
        values: [height, width], or [height, width, 3]
        alpha: 0 to 65535 [height, width]; None if all is opaque. What does not show at all is not measured.
        white_is_zero: Turn the result round.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise UndecodableImageError("non-finite pixels", f"{count} of {values.size} pixels are NaN or infinite")
    measured = values if alpha is None else values[alpha > 0]
    low, high = (float(measured.min()), float(measured.max())) if measured.size else (0.0, 0.0)
    scale = 255.0 / (high - low) if high > low else 0.0
    done = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # in bands: a float64 copy of the whole would be eight times the result
        rows = slice(start, start + 256)
        band = np.clip((values[rows].astype(np.float64) - low) * scale, 0, 255)
        if white_is_zero:
            band = 255 - band
        if alpha is not None:
            opacity = alpha[rows].astype(np.float64) / 65535
            band = 255 - (255 - band) * (opacity if band.ndim == 2 else opacity[..., None])
        done[rows] = np.rint(band)
    return Image.fromarray(done).convert("RGB")


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
