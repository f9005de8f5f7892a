"""Why bytes become no picture, said truly: damage, formats that are not read, metadata, and data that end early."""

import gzip
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.images import UndecodableImageError, decode_rgb

WORDS = b"about the figure "


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(side=64):
    y, x = np.mgrid[0:side, 0:side]
    return Image.fromarray(np.stack([x * 3 + 20, y * 3 + 20, x + y + 30], -1).astype(np.uint8))


def reject(data):
    with pytest.raises(UndecodableImageError) as caught:
        decode_rgb(data)
    assert caught.value.detail
    return caught.value


def outcome(data):
    try:
        decode_rgb(data)
    except UndecodableImageError as error:
        return error.reason
    return "picture"


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png, before=b"", after=b""):
    start = png.index(b"IDAT") - 4
    return png[:start] + before + png[start:-12] + after + png[-12:]


def brand(name):
    return struct.pack(">I", 24) + b"ftyp" + name + bytes(12)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("DICOM", bytes(128) + b"DICM\2\0\0\0UL\4\0" + bytes(100)),
        ("HEIC", brand(b"heic")),
        ("HEIC", brand(b"mif1")),
        ("JPEG XL", b"\xff\x0a" + bytes(50)),
        ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50)),
        ("JPEG XR", b"II\xbc\x01" + bytes(50)),
        ("JPEG-LS", b"\xff\xd8\xff\xf7\0\x0b\x08" + bytes(50)),
        ("SVG", b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("SVG", b"\xef\xbb\xbf <svg></svg>"),
        ("PDF", b"%PDF-1.7\n"),
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("EPS", b"\xc5\xd0\xd3\xc6" + bytes(50)),
        ("WMF", b"\xd7\xcd\xc6\x9a" + bytes(50)),
        ("EMF", b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(50)),
        ("FLI", b"\x80\0\0\0\x12\xaf" + bytes(50)),
        ("DDS", b"DDS |" + bytes(50)),
        ("OpenEXR", b"\x76\x2f\x31\x01" + bytes(50)),
        ("HDR", b"#?RADIANCE\n" + bytes(50)),
        ("FITS", b"SIMPLE  =                    T"),
        ("NIfTI", struct.pack("<I", 348) + bytes(340) + b"n+1\0" + bytes(50)),
        ("NRRD", b"NRRD0004\n"),
        ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(50)),
        ("DjVu", b"AT&TFORM" + bytes(50)),
        ("ICNS", b"icns" + bytes(50)),
        ("XCF", b"gimp xcf file\0"),
        ("CUR", b"\0\0\x02\0\x01\0" + bytes(50)),
        ("PAM", b"P7\nWIDTH 1\n"),
    ],
)
def test_a_format_that_is_not_read_is_named(name, data):
    error = reject(data)
    assert error.reason == f"unsupported format: {name}"
    assert "convert it" in error.detail
    assert "PNG" in error.detail


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "AVIF", "PPM", "ICO", "QOI", "SGI", "PCX"]
)
def test_the_beginning_of_a_known_format_is_never_said_to_be_no_image(kind):
    whole = encoded(picture(), kind)
    for length in (18, 24, 40, 70, len(whole) // 2):
        assert reject(whole[:length]).reason in ("truncated", "damaged"), length
    for length in (18, 24, 40, 70):
        assert outcome(whole[:length] + b"\xa5" * (len(whole) - length)) != "not an image", length


@pytest.mark.parametrize(
    "data",
    [
        b"BMJ Open 2020, figure 1, all rights reserved",
        b"P values below 0.05",
        b"P5 and P6 were not measured",
        b"<!DOCTYPE html><html><body><svg></svg></body></html>",
        b"plain text",
        gzip.compress(b"text", mtime=0),
        b"PK\3\4" + bytes(60),
        bytes(500),
    ],
)
def test_what_bears_no_signature_is_not_an_image(data):
    assert reject(data).reason == "not an image"


def test_a_tiff_that_ends_before_its_directory_is_truncated():
    whole = encoded(picture(), "TIFF", compression="packbits")
    assert reject(whole[: len(whole) // 2]).reason == "truncated"


def test_a_jpeg_of_12_bits_has_an_unsupported_mode():
    data = bytearray(encoded(picture(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 4] = 12
    error = reject(bytes(data))
    assert error.reason == "unsupported mode"
    assert "12-bit" in error.detail


@pytest.mark.parametrize(
    "chunks",
    [
        {"before": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(WORDS * 200_000))},
        {"after": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(WORDS * 200_000))},
        {"before": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(WORDS * 200_000))},
        {"before": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(WORDS * 60_000)) * 70},
        {"before": chunk(b"iCCP", b"profile\0\0" + zlib.compress(WORDS * 200_000))},
        {"before": chunk(b"iCCP", b"profile\0\1" + b"no deflate")},
        {"before": chunk(b"zTXt", b"Comment\0\1" + b"no deflate")},
    ],
)
def test_text_that_pillow_refuses_does_not_take_the_picture_with_it(chunks):
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 3
    plain, turned = (with_chunks(encoded(image, "PNG", **options), **chunks) for options in ({}, {"exif": exif}))
    assert np.array_equal(np.asarray(decode_rgb(plain)), np.asarray(image))
    assert np.array_equal(np.asarray(decode_rgb(turned)), np.asarray(image)[::-1, ::-1])


def test_text_that_may_say_how_the_picture_lies_is_not_dropped():
    whole = encoded(picture(), "PNG")
    error = reject(with_chunks(whole, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(WORDS * 200_000))))
    assert error.reason == "unreadable metadata"
    assert "MAX_TEXT_CHUNK" in error.detail
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="3"/>'
    upright = np.asarray(picture())[::-1, ::-1]
    large = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(WORDS * 200_000))
    for chunks in (chunk(b"iTXt", xmp), chunk(b"iTXt", xmp) + large):
        assert np.array_equal(np.asarray(decode_rgb(with_chunks(whole, chunks))), upright)


def png_of(rows, colour, interlace=0, height=64):
    header = struct.pack(">IIBBBBB", 64, height, 8, colour, 0, 0, interlace)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value", [0, 85, 170, 255, 90])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_a_png_whose_pixels_end_early_is_truncated_and_a_whole_one_is_not(colour, channels, value):
    rows = np.full((64, 64, channels), value, np.uint8)
    for count in (1, 33, 63):
        assert reject(png_of(rows[:count], colour)).reason == "truncated"
    assert decode_rgb(png_of(rows, colour)).size == (64, 64)


def test_an_interlaced_png_whose_last_pass_ends_early_is_truncated():
    for height in (64, 63):
        sides = [((height + 7) // 8, 8), ((height + 7) // 8, 8), ((height + 3) // 8, 16), ((height + 3) // 4, 16)]
        sides += [((height + 1) // 4, 32), ((height + 1) // 2, 32), (height // 2, 64)]
        rows = [np.full(width, 99, np.uint8) for count, width in sides for _ in range(count)]
        assert np.asarray(decode_rgb(png_of(rows, 0, 1, height))).tolist() == [[[99] * 3] * 64] * height
        assert reject(png_of(rows[:-1], 0, 1, height)).reason == "truncated"


@pytest.mark.parametrize("ink", [0, 1])
def test_black_and_white_pictures_are_whole_whatever_their_corners(ink):
    image = Image.new("1", (40, 30), ink)
    image.putpixel((0, 0), 1 - ink)
    image.putpixel((39, 29), 1 - ink)
    for kind, options in (("PNG", {}), ("TIFF", {"compression": "group4"}), ("PCX", {})):
        shown = np.asarray(decode_rgb(encoded(image, kind, **options)))
        assert np.array_equal(shown, np.asarray(image.convert("RGB"))), kind


def test_a_tiff_with_strips_for_a_part_of_its_rows_is_truncated():
    stream = io.BytesIO()
    picture().save(stream, "TIFF")
    whole = bytearray(stream.getvalue())
    with Image.open(stream) as image:
        assert image.tag_v2[278] == 64, "rows per strip"
    entry = whole.index(struct.pack("<HHI", 278, 4, 1))
    whole[entry + 8 : entry + 12] = struct.pack("<I", 20)
    assert reject(bytes(whole)).reason == "truncated"


def psd(image, lost_rows=0):
    """RLE, a packet a row; the red channel has so many rows less than it should."""
    array = np.asarray(image)
    height, width, channels = array.shape
    head = b"8BPS" + struct.pack(">H6xHIIHH12xH", 1, channels, height, width, 8, 3, 1)
    rows = [bytes([width - 1]) + array[row, :, band].tobytes() for band in range(channels) for row in range(height)]
    for row in range(height - lost_rows, height):
        rows[row] = b""
    return head + b"".join(struct.pack(">H", len(row)) for row in rows) + b"".join(rows)


def test_a_channel_that_ends_early_does_not_take_pixels_from_the_next():
    assert np.array_equal(np.asarray(decode_rgb(psd(picture()))), np.asarray(picture()))
    assert reject(psd(picture(), lost_rows=2)).reason == "truncated"


def sgi_rle(array):
    height, width, channels = array.shape
    rows = [
        b"".join(bytes([0x80 | 16]) + array[row, x : x + 16, band].tobytes() for x in range(0, width, 16)) + b"\0"
        for band in range(channels)
        for row in range(height - 1, -1, -1)
    ]
    starts = np.cumsum([512 + 8 * len(rows), *map(len, rows)])[:-1]
    tables = struct.pack(f">{len(rows)}I", *starts) + struct.pack(f">{len(rows)}I", *map(len, rows))
    head = struct.pack(">hBBHHHHll", 474, 1, 1, 3, width, height, channels, 0, 255).ljust(512, b"\0")
    return head + tables + b"".join(rows)


def test_a_row_of_an_sgi_that_ends_early_is_damage():
    whole = bytearray(sgi_rle(np.asarray(picture())))
    start = struct.unpack_from(">I", whole, 512 + 4 * 20)[0]
    assert whole[start + 2 * 17] == 0x80 | 16
    whole[start + 2 * 17] = 0  # two of four packets are left
    error = reject(bytes(whole))
    assert error.reason == "damaged"
    assert "32 of 64 pixels" in error.detail


def test_run_length_data_cut_off_anywhere_are_no_picture():
    image = picture()
    shades = image.convert("L")
    files = {
        "tga": encoded(image, "TGA", compression="tga_rle")[:-26],  # less the footer
        "pcx": encoded(image, "PCX"),
        "sgi": sgi_rle(np.asarray(image)),
        "psd": psd(image),
        "tiff": encoded(shades, "TIFF", compression="packbits"),
    }
    for name, whole in files.items():
        decode_rgb(whole)
        for part in (0.3, 0.6, 0.9, 0.99):
            assert reject(whole[: int(len(whole) * part)]).reason in ("truncated", "damaged"), (name, part)


def test_a_pcx_cut_before_its_palette_is_truncated():
    coloured = encoded(picture().quantize(64), "PCX")
    decode_rgb(coloured)
    assert reject(coloured[:-1]).reason == "truncated"
    assert reject(coloured[:-760]).reason == "truncated"
