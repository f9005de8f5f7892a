"""Pixels deeper than 8 bits: one rule for all modes, against values that NumPy works out from samples written here."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.images import UndecodableImageError, decode_rgb

HEIGHT, WIDTH = 23, 19
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def samples(channels, bits=12, dtype=np.uint16):
    """Random values of so many significant bits; no channel reaches both ends of the range."""
    rng = np.random.default_rng(channels)
    values = rng.integers(3, 1 << bits, (HEIGHT, WIDTH, channels)).astype(np.uint64)
    return np.stack([values[..., c] * (c + 5) // (channels + 4) + c for c in range(channels)], -1).astype(dtype)


def stretched(values, measured=None):
    values = values.astype(np.float64)
    measured = values if measured is None else measured.astype(np.float64)
    return np.rint(np.clip((values - measured.min()) * (255.0 / (measured.max() - measured.min())), 0, 255))


def pixels(data):
    return np.asarray(decode_rgb(data)).astype(int)


def gray(values):
    return np.repeat(values, 3, axis=-1)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values, extra=b"", interlaced=False):
    """A 16-bit PNG; each row is filtered by the difference from the row above, as encoders do."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    lines = []
    for x, y, step_x, step_y in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = values[y::step_y, x::step_x].astype(">u2")
        if part.size:
            rows = np.frombuffer(part.tobytes(), np.uint8).reshape(len(part), -1)
            above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
            lines += [b"\2" + row.tobytes() for row in rows - above]
    body = zlib.compress(b"".join(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(values, photometric, order="<", deflated=False, planes=1, extra=None, fmt=1, orientation=1, palette=None):
    height, width, channels = values.shape
    values = values.astype(values.dtype.newbyteorder(order))
    layers = values.transpose(2, 0, 1) if planes == 2 else values[None]
    strips = [zlib.compress(layer.tobytes()) if deflated else layer.tobytes() for layer in layers]
    starts = np.cumsum([8, *map(len, strips)])[:-1].tolist()
    tags = [
        *((256, 3, [width]), (257, 3, [height]), (258, 3, [values.dtype.itemsize * 8] * channels)),
        *((259, 3, [8 if deflated else 1]), (262, 3, [photometric]), (273, 4, starts), (274, 3, [orientation])),
        *((277, 3, [channels]), (278, 3, [height]), (279, 4, [len(strip) for strip in strips]), (284, 3, [planes])),
        *([] if palette is None else [(320, 3, palette)]),
        *([] if extra is None else [(338, 3, [extra])]),
        (339, 3, [fmt] * channels),
    ]
    directory = 8 + sum(map(len, strips))
    tail_start, entries, tail = directory + 2 + 12 * len(tags) + 4, b"", b""
    for number, kind, numbers in tags:
        body = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(body) > 4:
            tail, body = tail + body, struct.pack(order + "I", tail_start + len(tail))
        entries += struct.pack(order + "HHI", number, kind, len(numbers)) + body.ljust(4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HI", 42, directory)
    return head + b"".join(strips) + struct.pack(order + "H", len(tags)) + entries + bytes(4) + tail


def reject(data):
    with pytest.raises(UndecodableImageError) as caught:
        decode_rgb(data)
    return caught.value


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bits_of_a_png_gray_and_colours_alike(bits, interlaced):
    shade, colours = samples(1, bits), samples(3, bits)
    assert np.array_equal(pixels(png(shade, interlaced=interlaced)), gray(stretched(shade)))
    assert np.array_equal(pixels(png(colours, interlaced=interlaced)), stretched(colours))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_16_bits_of_a_tiff_gray_and_colours_alike(order, deflated):
    shade, colours = samples(1), samples(3)
    assert np.array_equal(pixels(tiff(shade, 1, order, deflated)), gray(stretched(shade)))
    assert np.array_equal(pixels(tiff(colours, 2, order, deflated)), stretched(colours))
    padded = np.concatenate([colours, np.full((HEIGHT, WIDTH, 1), 60_000, np.uint16)], -1)
    assert np.array_equal(pixels(tiff(padded, 2, order, deflated, extra=0)), stretched(colours))


def test_a_deep_tiff_on_its_side_ends_upright():
    colours = samples(3)
    for deflated in (False, True):
        turned = pixels(tiff(colours, 2, deflated=deflated, orientation=6))
        assert np.array_equal(turned, np.rot90(stretched(colours), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_with_alpha_over_white_and_what_is_hidden_is_not_measured(channels):
    colours = samples(channels)
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[:5], alpha[5:9] = 0, 32768
    colours[0, 0] = 65535  # hidden
    opacity = alpha / 65535
    expected = stretched(colours, colours[5:]) * opacity + 255 * (1 - opacity)
    expected = gray(expected) if channels == 1 else expected
    files = [png(np.concatenate([colours, alpha], -1))]
    if channels == 3:
        files += [tiff(np.concatenate([colours, alpha], -1), 2, order, extra=2) for order in "<>"]
    for data in files:
        assert np.abs(pixels(data) - expected).max() <= 1
        assert (pixels(data)[:5] == 255).all()


def test_alpha_that_was_multiplied_in_is_taken_out_before_the_range_is_measured():
    colours = samples(3, 16)
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[5:9] = 20_000
    multiplied = (colours * (alpha / 65535)).astype(np.uint16)
    expected = stretched(colours) * (alpha / 65535) + 255 * (1 - alpha / 65535)
    found = pixels(tiff(np.concatenate([multiplied, alpha], -1), 2, extra=1))
    assert np.abs(found - expected).max() <= 1


def test_the_one_colour_that_a_deep_png_declares_transparent_is_white():
    for channels in (1, 3):
        values = samples(channels)
        values[2, 3] = [4000, 4001, 4002][:channels]
        key = chunk(b"tRNS", struct.pack(f">{channels}H", *values[2, 3]))
        rest = np.delete(values.reshape(-1, channels), 2 * WIDTH + 3, axis=0)
        expected = stretched(values, rest)
        expected[2, 3] = 255
        assert np.array_equal(pixels(png(values, key)), gray(expected) if channels == 1 else expected)


@pytest.mark.parametrize(
    ("dtype", "fmt", "low", "high"),
    [
        (np.uint32, 1, 5, 4_000_000_000),
        (np.int32, 2, -2_000_000_000, 2_000_000_000),
        (np.int16, 2, -1000, 3000),
        (np.float32, 3, -1000, 3000),
    ],
)
def test_integers_and_floats_are_stretched_whatever_their_sign(dtype, fmt, low, high):
    values = np.linspace(low, high, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1).astype(dtype)
    for deflated in (False, True):
        assert np.array_equal(pixels(tiff(values, 1, deflated=deflated, fmt=fmt)), gray(stretched(values)))


@pytest.mark.parametrize(("dtype", "fmt"), [(np.uint8, 1), (np.uint16, 1), (np.float32, 3)])
@pytest.mark.parametrize("deflated", [False, True])
def test_white_is_zero_at_every_depth(dtype, fmt, deflated):
    values = np.arange(256, dtype=dtype).reshape(16, 16, 1)
    assert np.array_equal(pixels(tiff(values, 0, deflated=deflated, fmt=fmt)), 255 - gray(values.astype(int)))


def test_16_bits_of_a_pixmap():
    colours, shade = samples(3), samples(1)
    head = f"{WIDTH} {HEIGHT} 65535\n".encode()
    assert np.array_equal(pixels(b"P6 " + head + colours.astype(">u2").tobytes()), stretched(colours))
    assert np.array_equal(pixels(b"P5 " + head + shade.astype(">u2").tobytes()), gray(stretched(shade)))
    assert reject(b"P6 " + head + colours.astype(">u2").tobytes()[:-1]).reason == "truncated"


def test_inks_are_shown_as_they_are():
    inks = np.zeros((4, 4, 4), np.uint16)
    inks[..., 0] = 0x8000
    eight = np.full((4, 4, 4), (0x80, 0, 0, 0), np.uint8)
    assert np.array_equal(pixels(tiff(inks, 5)), pixels(tiff(eight, 5)))


def test_a_palette_of_8_bit_colours_in_16_bit_fields_is_not_black():
    places = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 9)])
    expected = colours[:, places[..., 0]].transpose(1, 2, 0)
    for scale in (1, 256, 257):
        for deflated in (False, True):
            data = tiff(places, 3, deflated=deflated, palette=(colours * scale).ravel().tolist())
            assert np.array_equal(pixels(data), expected), scale


def sgi(bytes_per_sample):
    head = struct.pack(">hBBHHHH", 474, 0, bytes_per_sample, 3, 4, 4, 3).ljust(512, b"\0")
    return head + bytes(4 * 4 * 3 * bytes_per_sample)


def jpeg2000(bits):
    """The header says so; nothing behind it is looked at."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(stream, "JPEG2000", no_jp2=True)
    data = bytearray(stream.getvalue())
    for channel in range(3):
        assert data[42 + 3 * channel] == 7
        data[42 + 3 * channel] = bits - 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (tiff(samples(3), 2, planes=2), "TIFF of mode RGB with 16 bits per sample in planes"),
        (tiff(samples(3), 2, planes=2, deflated=True), "TIFF of mode RGB with 16 bits per sample in planes"),
        (tiff(samples(1), 1, planes=2), "TIFF of mode I;16 with 16 bits per sample in planes"),
        (tiff(samples(1, 8, np.uint8), 0, planes=2), "TIFF of mode L with 8 bits per sample in planes"),
        (tiff(samples(2), 1, extra=2), "bits per sample (16, 16)"),
        (tiff(samples(3, 20, np.uint32), 2), "bits per sample (32, 32, 32)"),
        (tiff(samples(1).astype(np.float64), 1, fmt=3), "bits per sample (64,), sample format (3,)"),
        (sgi(2), "SGI of mode RGB with 16 bits"),
        (jpeg2000(12), "JPEG2000 of mode RGB with 12 bits"),
        (b"P3 2 1 65535\n1 2 3 4 5 65535\n", "PPM of mode RGB with 16 bits"),
        (b"8BPS" + struct.pack(">H6xHIIHH12x", 1, 3, 4, 4, 16, 3), "PSD of colour mode 3 with 16 bits"),
    ],
)
def test_what_cannot_be_read_in_full_is_refused_by_name(data, named):
    error = reject(data)
    assert error.reason == "unsupported mode"
    assert named in error.detail
    assert "PNG with 8 or 16 bits" in error.detail


def test_planes_that_pillow_reads_rightly_are_read():
    colours, shade = samples(3, 8, np.uint8), samples(1)
    assert np.array_equal(pixels(tiff(colours, 2, planes=2)), colours)
    assert np.array_equal(pixels(tiff(colours, 2, planes=2, deflated=True)), colours)
    assert np.array_equal(pixels(tiff(shade, 1, planes=2, deflated=True)), gray(stretched(shade)))


def test_the_reported_files_are_the_pictures_that_a_viewer_shows(shared_data):
    folder = shared_data / "reports" / "case-20"
    inverted = pixels((folder / "uint16_miniswhite.tif").read_bytes())
    with Image.open(folder / "uint16_miniswhite.tif") as image:
        assert np.array_equal(inverted, 255 - gray(stretched(np.asarray(image)[..., None])))
    for name in ("rgb16_12bit.tif", "png16la.png"):
        found = pixels((folder / name).read_bytes())
        assert (found.min(), found.max()) == (0, 255), name
