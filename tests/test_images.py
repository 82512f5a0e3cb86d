"""Images: what decode, resize, normalise and pad promise, and that hostile files end in ImageError."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retinanet.errors import ConfigError, ImageError
from retinanet.images import BACKGROUND, Geometry, Preprocessing, decode, examine, pad_to, read_size, stack

RED, GREEN, GREY = (200, 30, 10), (20, 180, 60), 100


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


# Orientation


# Where a pixel (row, column) of an upright 2 x 3 picture is stored under each EXIF orientation, from the
# definition "row 0 is the visual ..., column 0 is the visual ...".
STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_same_upright_picture(form, orientation, tmp_path):
    upright = picture(31, 17)
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(stored, form, exif=exif(orientation), **options)
    path = tmp_path / "image"
    path.write_bytes(data)
    handed_in = Image.open(io.BytesIO(data))
    for source in (path, str(path), data, handed_in, ImageOps.exif_transpose(handed_in)):
        np.testing.assert_array_equal(decode(source), upright)
    assert read_size(path) == (31, 17)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_orientation_is_that_of_pillow(orientation, tmp_path):
    data = encoded(Image.fromarray(picture(24, 16)), "JPEG", exif=exif(orientation))
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(path), expected)
    assert read_size(path) == (expected.shape[1], expected.shape[0])


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    data = encoded(Image.fromarray(picture(9, 5)), "PNG")
    late = data[:-12] + png_chunk(b"eXIf", exif(6).tobytes()[6:]) + data[-12:]
    path = tmp_path / "late.png"
    path.write_bytes(late)
    assert decode(path).shape == (9, 5, 3)
    assert read_size(path) == (5, 9)


def test_a_pil_image_handed_in_is_not_changed():
    image = Image.open(io.BytesIO(encoded(Image.fromarray(picture(9, 5)), "PNG", exif=exif(6))))
    decode(image)
    assert image.size == (9, 5)
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    upright = picture(9, 5)
    data = encoded(Image.fromarray(upright), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decode(data), upright)


def test_damaged_exif_is_none():
    upright = picture(9, 5)
    data = encoded(Image.fromarray(upright), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    np.testing.assert_array_equal(decode(data), upright)


# Modes


def with_alpha(mode: str, colour: tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (2, 2), colour)


def palette(transparent: int | bytes | None, mode: str = "P") -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([*GREEN, *RED])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image if mode == "P" else image.convert(mode)


def sixteen_bit(mode: str, value: int) -> Image.Image:
    return Image.new(mode, (2, 2), value)


MODES = [
    (Image.new("1", (2, 2), 1), (255, 255, 255), "bilevel"),
    (Image.new("L", (2, 2), GREY), (GREY,) * 3, "grey"),
    (Image.new("RGB", (2, 2), RED), RED, "colour"),
    (Image.new("RGBX", (2, 2), (*RED, 0)), RED, "the fourth byte of RGBX is no alpha"),
    (palette(None), RED, "palette"),
    (palette(1), BACKGROUND, "palette with one transparent entry"),
    (palette(0), RED, "palette, another entry is transparent"),
    (palette(bytes([255, 0])), BACKGROUND, "palette with an alpha for each entry"),
    (palette(None, "PA"), RED, "palette and alpha, opaque"),
    (palette(1, "PA"), BACKGROUND, "palette and alpha, transparent"),
    (with_alpha("RGBA", (*RED, 255)), RED, "opaque"),
    (with_alpha("RGBA", (*RED, 0)), BACKGROUND, "colour under full transparency is not seen"),
    (with_alpha("RGBA", (0, 0, 0, 51)), (204,) * 3, "a fifth of black over white"),
    (with_alpha("RGBa", (0, 0, 0, 51)), (204,) * 3, "the same, premultiplied"),
    (with_alpha("LA", (GREY, 255)), (GREY,) * 3, "grey, opaque"),
    (with_alpha("LA", (GREY, 0)), BACKGROUND, "grey, transparent"),
    (with_alpha("LA", (0, 51)).convert("La"), (204,) * 3, "grey, premultiplied"),
    (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0), "print colours"),
    (Image.new("YCbCr", (2, 2), (GREY, 128, 128)), (GREY,) * 3, "luma and chroma"),
    (Image.new("HSV", (2, 2), (0, 0, GREY)), (GREY,) * 3, "hue"),
    (sixteen_bit("I;16", 0xFFFF), (255,) * 3, "16 bit white"),
    (sixteen_bit("I;16", 0x1234), (0x12,) * 3, "16 bit keeps the high byte, it does not saturate"),
    (sixteen_bit("I;16B", 0x1234), (0x12,) * 3, "16 bit, big-endian"),
    (sixteen_bit("I", 0x1234), (0x12,) * 3, "16 bit in a 32-bit cell"),
]


@pytest.mark.parametrize(("image", "colour", "why"), MODES, ids=[case[2] for case in MODES])
def test_every_mode_becomes_rgb(image, colour, why):
    decoded = decode(image)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (2, 2, 3)
    assert decoded.tolist() == np.full((2, 2, 3), colour).tolist(), why


def test_cie_lab_becomes_rgb_to_within_its_rounding():
    decoded = decode(Image.new("RGB", (2, 2), RED).convert("LAB"))
    np.testing.assert_allclose(decoded, np.full((2, 2, 3), RED), atol=2)


FILES = [
    ("PNG", Image.new("RGB", (2, 2), RED), {"transparency": RED}, BACKGROUND, "colour key"),
    ("PNG", Image.new("L", (2, 2), GREY), {"transparency": GREY}, BACKGROUND, "grey key"),
    ("PNG", Image.new("L", (2, 2), GREY), {"transparency": 7}, (GREY,) * 3, "grey key elsewhere"),
    ("PNG", sixteen_bit("I;16", 0x1234), {"transparency": 0x1234}, BACKGROUND, "16-bit grey key"),
    ("PNG", sixteen_bit("I;16", 0x1234), {"transparency": 0x1235}, (0x12,) * 3, "one off the key"),
    ("GIF", palette(None), {"transparency": 1}, BACKGROUND, "transparent GIF"),
    ("PPM", sixteen_bit("I", 0x1234), {}, (0x12,) * 3, "16-bit PGM"),
    ("TIFF", sixteen_bit("I;16B", 0x1234), {}, (0x12,) * 3, "big-endian 16-bit TIFF"),
    ("TIFF", Image.new("CMYK", (2, 2), (0, 255, 255, 0)), {}, (255, 0, 0), "CMYK TIFF"),
    ("BMP", Image.new("RGB", (2, 2), RED), {}, RED, "bitmap"),
    ("WEBP", with_alpha("RGBA", (0, 0, 0, 51)), {"lossless": True}, (204,) * 3, "WebP with alpha"),
]


@pytest.mark.parametrize(("form", "image", "options", "colour", "why"), FILES, ids=[c[4] for c in FILES])
def test_files_keep_colours_and_transparency(form, image, options, colour, why):
    assert decode(encoded(image, form, **options))[1, 1].tolist() == list(colour), why


STORED = [
    ("PNG", Image.new("RGB", (4, 2), RED), {}, "RGB", 1),
    ("PNG", Image.new("L", (4, 2), GREY), {}, "L", 1),
    ("PNG", palette(None), {}, "P", 1),
    ("PNG", with_alpha("RGBA", (*RED, 9)), {}, "RGBA", 1),
    ("PNG", sixteen_bit("I;16", 0x1234), {}, "I;16", 1),
    ("TIFF", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), {}, "CMYK", 1),
    ("JPEG", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), {}, "CMYK", 1),
    ("GIF", palette(None), {}, "P", 1),
    (
        "GIF",
        Image.new("L", (4, 2)),
        {"save_all": True, "append_images": [Image.new("L", (4, 2), GREY)]},
        "P",
        2,
    ),
    (
        "PNG",
        Image.new("RGB", (4, 2)),
        {"save_all": True, "append_images": [Image.new("RGB", (4, 2), RED)]},
        "RGB",
        2,
    ),
    (
        "WEBP",
        Image.new("RGB", (4, 2)),
        {"save_all": True, "append_images": [Image.new("RGB", (4, 2), RED)]},
        "RGB",
        2,
    ),
    ("TIFF", Image.new("L", (4, 2)), {"save_all": True, "append_images": [Image.new("L", (4, 2))]}, "L", 2),
    (
        "MPO",
        Image.new("RGB", (4, 2)),
        {"save_all": True, "append_images": [Image.new("RGB", (4, 2), RED)]},
        "RGB",
        1,
    ),
]


@pytest.mark.parametrize(("form", "image", "options", "mode", "frames"), STORED)
def test_examining_says_how_an_image_is_stored(tmp_path, form, image, options, mode, frames):
    path = tmp_path / "image"
    path.write_bytes(encoded(image, form, **options))
    found = examine(path)
    assert (found.orientation, found.mode, found.frames) == (1, mode, frames)
    assert found.pixels.tolist() == decode(path).tolist()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_examining_says_how_an_image_was_turned(tmp_path, form, orientation):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(picture(6, 4)), form, exif=exif(orientation)))
    found = examine(path)
    assert found.orientation == orientation
    assert found.pixels.shape == ((6, 4, 3) if orientation > 4 else (4, 6, 3))


def test_examining_refuses_what_decoding_refuses(tmp_path):
    (tmp_path / "large.png").write_bytes(png_claiming(300, 200))
    with pytest.raises(ImageError, match="300 x 200 pixels are more than max_pixels = 5000"):
        examine(tmp_path / "large.png", max_pixels=5000)
    (tmp_path / "half.jpg").write_bytes(encoded(Image.fromarray(picture(40, 30)), "JPEG")[:-300])
    with pytest.raises(
        ImageError, match=r"half.jpg: damaged, truncated or unreadable \(image file is truncated"
    ):
        examine(tmp_path / "half.jpg")


def test_colours_of_16_bits_keep_their_high_byte(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">3H", 0x1234, 0xABCD, 0xFFFF) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert decode(b"\x89PNG\r\n\x1a\n" + data)[1, 1].tolist() == [0x12, 0xAB, 0xFF]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    for form in ("PNG", "TIFF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert decode(data)[0, 0].tolist() == list(RED)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (2, 2), 0.5), "32-bit float pixels have no known range"),
        (Image.new("I", (2, 2), 65536), r"range 0\.\.65535; got 65536\.\.65536"),
        (Image.new("I", (2, 2), -1), r"range 0\.\.65535; got -1\.\.-1"),
        (Image.new("RGB", (0, 3)), "at least one pixel; got 0 x 3"),
    ],
)
def test_pil_images_without_a_meaning_are_refused(image, message):
    with pytest.raises(ImageError, match=message):
        decode(image)


# Arrays


def test_arrays_are_taken_by_their_shape():
    rgb = picture(4, 3)
    assert decode(rgb) is rgb
    np.testing.assert_array_equal(decode(np.ascontiguousarray(rgb[..., ::-1]), bgr=True), rgb)
    grey = rgb[..., 0]
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(decode(array), np.stack([grey] * 3, axis=2))
    opaque = np.dstack([rgb, np.full((3, 4), 255, np.uint8)])
    np.testing.assert_array_equal(decode(opaque), rgb)
    np.testing.assert_array_equal(decode(opaque[..., [2, 1, 0, 3]], bgr=True), rgb)
    transparent = np.dstack([rgb, np.zeros((3, 4), np.uint8)])
    assert (decode(transparent) == 255).all()


def test_what_decode_returns_is_contiguous_and_writable():
    data = encoded(Image.fromarray(picture(4, 3)), "PNG")
    for source in (data, picture(8, 6)[::2, ::2], Image.fromarray(picture(4, 3)), picture(4, 3)[..., 0]):
        decoded = decode(source)
        assert decoded.flags.c_contiguous
        assert decoded.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), bool),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ImageError, match=r"uint8 and shape .* not empty; got"):
        decode(array)


def test_bgr_is_for_arrays(tmp_path):
    with pytest.raises(ImageError, match="needs an array for bgr=True; got "):
        decode(tmp_path / "a.png", bgr=True)


def test_other_types_are_refused():
    with pytest.raises(ImageError, match="a path, bytes, a PIL image or a uint8 array; got int"):
        decode(3)


# Files that are no images


def broken_files() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(Image.fromarray(picture(64, 64)), "JPEG")
    png = encoded(Image.fromarray(picture(64, 64)), "PNG")
    not_an_image = "not an image in any of the formats JPEG, PNG"
    return {
        "half.jpg": (jpeg[: len(jpeg) // 2], "damaged, truncated"),
        "half.png": (png[: len(png) // 2], "damaged, truncated"),
        "empty.jpg": (b"", not_an_image),
        "text.png": (b"this is no image\n", not_an_image),
        "drawing.eps": (encoded(Image.new("RGB", (4, 4)), "EPS"), not_an_image),
        "eps.jpg": (encoded(Image.new("RGB", (4, 4)), "EPS"), not_an_image),
        "icon.ico": (encoded(Image.new("RGB", (16, 16)), "ICO"), not_an_image),
        "bomb.png": (png_claiming(60_000, 60_000), "too large .*3600000000 pixels.*max_pixels"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_named(name, tmp_path):
    data, message = broken_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"{name}: .*{message}"):
        decode(path)
    with pytest.raises(ImageError, match=f"image of {len(data)} bytes: .*{message}"):
        decode(data)


def test_the_size_is_checked_before_decoding():
    with pytest.raises(ImageError, match="9000 x 9000 pixels are more than max_pixels = 1000000; scale"):
        decode(png_claiming(9_000, 9_000), max_pixels=1_000_000)
    with pytest.raises(ImageError, match="8 x 8 pixels are more than max_pixels = 63"):
        decode(Image.new("RGB", (8, 8)), max_pixels=63)
    assert decode(Image.new("RGB", (8, 8)), max_pixels=64).shape == (8, 8, 3)


def test_missing_files_and_folders_are_named(tmp_path):
    for read in (decode, read_size):
        with pytest.raises(ImageError, match=r"nowhere\.jpg: there is no such file"):
            read(str(tmp_path / "nowhere.jpg"))
        with pytest.raises(ImageError, match=f"{tmp_path.name}: this is a folder"):
            read(tmp_path)
    with pytest.raises(ImageError, match="damaged, truncated or unreadable"):
        decode("x" * 5000)


def test_reading_a_size_does_not_decode(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_claiming(9_000, 9_000))  # its pixels are missing
    assert read_size(path) == (9_000, 9_000)


REFUSED, SOUND = "refused", "uint8 [H, W, 3]"


def outcome(data: bytes) -> str:
    try:
        decoded = decode(data, max_pixels=1_000_000)
    except ImageError:
        return REFUSED
    return f"{decoded.dtype} [{', '.join(['H', 'W', *map(str, decoded.shape[2:])])}]"


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_random_bytes_end_in_an_image_or_an_image_error(data):
    assert outcome(data) in (REFUSED, SOUND)


@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, 200),
)
@settings(max_examples=150, deadline=None)
def test_mutated_files_end_in_an_image_or_an_image_error(form, changes, cut):
    data = bytearray(encoded(Image.fromarray(picture(20, 12)), form))
    for position, value in changes:
        data[position % len(data)] = value
    assert outcome(bytes(data[: len(data) - cut])) in (REFUSED, SOUND)


# Preprocessing


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((500, 375), {}, (1067, 800)),  # 500 * 800 / 375 = 1066.67
        ((500, 375), {"size_rounding": "floor"}, (1066, 800)),
        ((375, 500), {}, (800, 1067)),  # portrait
        ((640, 480), {}, (1067, 800)),
        ((1333, 800), {}, (1333, 800)),  # nothing to do
        ((2000, 500), {}, (1333, 333)),  # the longest side limits: 500 * 1333 / 2000 = 333.25
        ((10_000, 3), {}, (1333, 1)),  # 0.4 pixels become one
        ((1, 1), {}, (800, 800)),
        ((320, 240), {"image_size": 240, "max_size": 320}, (320, 240)),
    ],
)
def test_resized_size(size, options, expected):
    assert Preprocessing(**options).resized_size(*size) == expected


def test_floor_rounds_as_torchvision_does():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    theirs = GeneralizedRCNNTransform(40, 66, [0, 0, 0], [1, 1, 1])
    ours = Preprocessing(image_size=40, max_size=66, size_rounding="floor")
    for width in range(20, 120, 7):
        for height in (21, 49, 75, 98):
            image, _ = theirs.resize(torch.zeros(3, height, width), None)
            assert ours.resized_size(width, height) == (image.shape[2], image.shape[1])


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_prepare_is_the_naive_formula(channel_order):
    image = picture(40, 30)
    preprocessing = Preprocessing(image_size=45, max_size=80, channel_order=channel_order)
    prepared, geometry = preprocessing.prepare(image)
    resized = np.asarray(Image.fromarray(image).resize((60, 45), Image.Resampling.BILINEAR), np.float64)
    expected = ((resized - preprocessing.mean) / preprocessing.std).transpose(2, 0, 1)
    np.testing.assert_allclose(prepared, expected if channel_order == "rgb" else expected[::-1], atol=1e-5)
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    assert geometry == Geometry(original=(40, 30), resized=(60, 45))


@pytest.mark.parametrize(("width", "height"), [(40, 30), (31, 77), (300, 200), (1, 1), (7, 1)])
def test_linear_is_torch_interpolate(width, height):
    image = picture(width, height)
    preprocessing = Preprocessing(image_size=64, max_size=100, resize="linear")
    prepared, geometry = preprocessing.prepare(image)
    new_width, new_height = geometry.resized
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(tensor, (new_height, new_width), mode="bilinear")[0].numpy()
    expected = (theirs.transpose(1, 2, 0) - preprocessing.mean) / preprocessing.std
    np.testing.assert_allclose(prepared, expected.transpose(2, 0, 1), atol=1e-3)


def test_resizing_and_normalising_commute():
    image = picture(40, 30)
    plain = Preprocessing(image_size=64, max_size=100, resize="linear", mean=(0, 0, 0), std=(1, 1, 1))
    resized_first, _ = Preprocessing(image_size=64, max_size=100, resize="linear").prepare(image)
    assert resized_first.shape == (3, 64, 85)
    resized, _ = plain.prepare(image)
    defaults = Preprocessing()
    expected = (resized - np.reshape(defaults.mean, (3, 1, 1))) / np.reshape(defaults.std, (3, 1, 1))
    np.testing.assert_allclose(resized_first, expected, atol=1e-5)


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_a_networks_input_can_be_looked_at(channel_order):
    image = picture(40, 30)
    preprocessing = Preprocessing(image_size=45, max_size=80, channel_order=channel_order)
    resized = np.asarray(Image.fromarray(image).resize((60, 45), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(preprocessing.restore(preprocessing.prepare(image)[0]), resized)
    padding = preprocessing.restore(np.zeros((3, 1, 1), np.float32))
    assert padding.tolist() == [[[124, 116, 104]]]  # the mean colour


@pytest.mark.parametrize("resize", ["antialias", "linear"])
def test_an_image_of_the_right_size_is_not_resampled(resize):
    image = picture(64, 48)
    plain = Preprocessing(image_size=48, max_size=64, resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
    prepared, geometry = plain.prepare(image)
    np.testing.assert_array_equal(prepared, image.transpose(2, 0, 1))
    assert geometry.original == geometry.resized


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), "u1")]
)
def test_prepare_refuses_what_decode_did_not_return(array):
    with pytest.raises(ImageError, match=r"prepare needs a decoded image, uint8 \[H, W, 3\]; got"):
        Preprocessing().prepare(array)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"Preprocessing\.image_size needs a whole number from 1; got 0"),
        ({"max_size": 1333.0}, r"Preprocessing\.max_size needs a whole number from 1; got 1333\.0"),
        ({"divisor": True}, r"Preprocessing\.divisor needs a whole number from 1; got True"),
        (
            {"image_size": 900, "max_size": 800},
            "image_size .* max_size .*got image_size 900 and max_size 800",
        ),
        ({"size_rounding": "ceil"}, "size_rounding needs nearest or floor; got 'ceil'"),
        ({"resize": "cubic"}, "resize needs antialias or linear; got 'cubic'"),
        ({"channel_order": "BGR"}, "channel_order needs rgb or bgr; got 'BGR'"),
        ({"mean": (1, 2)}, r"mean needs three finite numbers \(R, G, B\); got \(1, 2\)"),
        ({"mean": 0.5}, "mean needs three finite numbers"),
        ({"std": (1, 2, float("nan"))}, "std needs three finite numbers"),
        ({"std": (1, 0, 1)}, "std needs numbers above 0"),
    ],
)
def test_impossible_preprocessing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**options)


def test_lists_from_a_file_make_an_equal_preprocessing():
    assert Preprocessing(mean=[1, 2, 3], std=[1, 1, 1]) == Preprocessing(mean=(1.0, 2.0, 3.0), std=(1, 1, 1))


# Geometry


@given(
    st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    st.tuples(st.integers(1, 1333), st.integers(1, 1333)),
    st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=5),
)
def test_boxes_survive_the_round_trip(original, resized, fractions):
    geometry = Geometry(original, resized)
    boxes = (np.reshape(fractions, (-1, 4)) * np.tile(original, 2)).astype(np.float32)
    there = geometry.to_network(boxes)
    back = geometry.to_original(there)
    assert there.dtype == back.dtype == np.float32
    assert back.shape == boxes.shape
    np.testing.assert_allclose(back, boxes, atol=1e-3)
    assert (there <= np.tile(resized, 2)).all()


def test_each_axis_has_its_own_scale():
    geometry = Geometry(original=(100, 50), resized=(200, 200))
    np.testing.assert_array_equal(geometry.to_network(np.array([[10, 10, 20, 30]])), [[20, 40, 40, 120]])


def test_to_original_clips_into_the_image():
    geometry = Geometry(original=(100, 50), resized=(200, 100))
    boxes = np.array([[-5, -5, 300, 300]], np.float32)
    np.testing.assert_array_equal(geometry.to_original(boxes), [[0, 0, 100, 50]])


def test_a_bright_square_is_where_its_box_says():
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:40, 30:60] = 255
    plain = Preprocessing(image_size=120, max_size=180, mean=(0, 0, 0), std=(1, 1, 1))
    prepared, geometry = plain.prepare(image)
    x1, y1, x2, y2 = geometry.to_network(np.array([[30, 20, 60, 40]]))[0].astype(int)
    assert prepared[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() == 255
    assert prepared.sum() == pytest.approx(255 * 3 * (x2 - x1) * (y2 - y1), rel=1e-2)


# Batches


def test_stack_pads_right_and_below_with_zeros():
    images = [np.ones((3, 33, 20), np.float32), np.full((3, 5, 64), 2, np.float32)]
    batch = stack(images, divisor=32)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.dtype == np.float32
    for padded, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(padded[:, : image.shape[1], : image.shape[2]], image)
        assert padded.sum() == image.sum()


def test_pad_to_a_fixed_size():
    assert pad_to((10, 20), [np.ones((3, 10, 7), np.float32)]).shape == (1, 3, 10, 20)
    assert pad_to((10, 20), []).shape == (0, 3, 10, 20)


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="stack needs at least one image"):
        stack([], divisor=32)
    with pytest.raises(ConfigError, match=r"at most 10 x 20 .*; image 0 has 11 x 7"):
        pad_to((10, 20), [np.ones((3, 11, 7), np.float32)])


# Real images


@pytest.mark.skipif("RETINANET_TEST_DATA" not in os.environ, reason="RETINANET_TEST_DATA is not set")
@pytest.mark.parametrize(
    ("pattern", "every"), [("bccd/BCCD/JPEGImages/*.jpg", 60), ("nuclei/stage1_train/*/images/*.png", 60)]
)
def test_real_images_decode_to_the_size_their_header_says(pattern, every):
    root = Path(os.environ["RETINANET_TEST_DATA"])
    paths = sorted(root.glob(pattern))[::every]
    assert len(paths) >= 5
    for path in paths:
        image = decode(path)
        assert read_size(path) == (image.shape[1], image.shape[0])
        np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))  # all are opaque
