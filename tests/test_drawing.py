"""Drawing: outlines where the boxes are, captions inside the picture, files complete or absent."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet import drawing
from retinanet.drawing import PALETTE, class_colour, contact_sheet, draw_boxes, save_image, side_by_side
from retinanet.errors import ConfigError, DataError

ORANGE, SKY = PALETTE[:2]


def grey(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def changed(picture: Image.Image, value: int = 128) -> np.ndarray:
    """Where a picture drawn on plain grey is no longer grey: (left, top, right, bottom)."""
    rows, columns = np.nonzero((np.asarray(picture) != value).any(axis=2))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


# Boxes


def test_without_boxes_the_picture_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (480, 600, 3), dtype=np.uint8)
    for captions in (None, []):
        drawn = draw_boxes(image, np.zeros((0, 4), np.float32), captions=captions)
        np.testing.assert_array_equal(np.asarray(drawn), image)


def test_all_four_corners_have_the_colour_of_the_class():
    boxes = np.array([[50, 60, 200, 300], [300, 100, 500, 400]], np.float32)
    drawn = draw_boxes(grey(640, 480), boxes, groups=[0, 1])
    for (x1, y1, x2, y2), colour in zip(boxes.astype(int), (ORANGE, SKY), strict=True):
        for corner in itertools.product((x1, x2 - 1), (y1, y2 - 1)):
            assert drawn.getpixel(corner) == colour
        assert drawn.getpixel(((x1 + x2) // 2, (y1 + y2) // 2)) == (128, 128, 128)


def test_an_outline_lies_on_the_edge_of_its_box():
    drawn = draw_boxes(grey(640, 480), np.array([[100, 150, 200, 250]], np.float32))
    np.testing.assert_allclose(changed(drawn), [100, 150, 200, 250], atol=2)


def test_own_colours_replace_the_palette():
    boxes = np.array([[50, 60, 200, 300]], np.float32)
    drawn = draw_boxes(grey(640, 480), boxes, groups=[1], colours=[(0, 0, 0), (1, 2, 3)])
    assert drawn.getpixel((50, 60)) == (1, 2, 3)


def test_what_is_ignored_is_grey_and_hatched_and_can_be_seen_through():
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    boxes = np.array([[50, 60, 200, 300], [300, 100, 500, 400]], np.float32)
    drawn = np.asarray(draw_boxes(image, boxes, groups=[0, 1], ignored=np.array([True, False])))
    assert drawn[60, 50].tolist() == list(drawing.IGNORED)
    assert drawn[100, 300].tolist() == list(SKY)
    inside = slice(110, 290), slice(60, 190)
    assert (drawn[inside] != image[inside]).any(axis=2).mean() > 0.9
    # Stripes cover more than what is between them, and neither covers all.
    for covered, shade in ((170, 2), (70, 4)):
        share = (np.abs(drawn[inside] - (image[inside] + (128.0 - image[inside]) * covered / 255)) < 1).all(
            axis=2
        )
        assert share.mean() == pytest.approx(shade / 6, abs=0.05)
    np.testing.assert_array_equal(drawn[150:350, 320:480], image[150:350, 320:480])


def test_ignored_is_said_of_every_box():
    with pytest.raises(DataError, match="draw_boxes needs one ignored a box; got"):
        draw_boxes(grey(64, 48), np.array([[5, 6, 20, 30]], np.float32), ignored=np.array([True, False]))


def test_the_best_box_is_on_top():
    boxes = np.array([[50, 60, 200, 300]] * 2, np.float32)
    assert draw_boxes(grey(640, 480), boxes, groups=[1, 0]).getpixel((50, 60)) == SKY


def test_the_image_handed_in_is_not_changed():
    image = grey(640, 480)
    draw_boxes(image, np.array([[50, 60, 200, 300]]), captions=["cat 0.98"])
    assert (image == 128).all()


@pytest.mark.parametrize(
    ("size", "expected", "why"),
    [
        ((640, 480), (640, 480), "large enough"),
        ((256, 256), (512, 512), "a whole factor, not 480"),
        ((100, 50), (1000, 500), "the shortest side counts"),
        ((2000, 20), (2000, 20), "the longest side would pass 2048"),
        ((900, 10), (1800, 20), "as far as the longest side allows"),
        ((4000, 3000), (4000, 3000), "large photographs are not scaled down"),
    ],
)
def test_small_images_are_enlarged(size, expected, why):
    box = np.array([[0.25, 0.25, 0.75, 0.75]]) * [*size, *size]
    drawn = draw_boxes(grey(*size), box)
    assert drawn.size == expected, why
    np.testing.assert_allclose(changed(drawn), np.tile(expected, 2) * [0.25, 0.25, 0.75, 0.75], atol=8)


def test_outlines_grow_with_the_picture():
    def inked(width: int, height: int) -> float:
        drawn = draw_boxes(grey(width, height), np.array([[0.2, 0.2, 0.8, 0.8]]) * ([width, height] * 2))
        return float((np.asarray(drawn) != 128).any(axis=2).mean())

    assert inked(2560, 1920) == pytest.approx(inked(640, 480), rel=0.5)


# Captions


def test_a_caption_stands_above_its_box_or_inside_where_there_is_no_room():
    def extent(box: list[float]) -> np.ndarray:
        return changed(draw_boxes(grey(640, 480), np.array([box]), captions=["cat 0.98"]))

    above = extent([100, 150, 400, 350])
    assert 120 < above[1] < 140
    np.testing.assert_allclose(above[[0, 2, 3]], [100, 400, 350], atol=2)
    np.testing.assert_allclose(extent([100, 0, 400, 350]), [100, 0, 400, 350], atol=2)
    below = extent([100, 0, 110, 10])  # too small to hold it
    assert below[3] > 20


def test_captions_do_not_cover_each_other():
    boxes = np.array([[100, 100, 300, 300]] * 3, np.float32)
    captions = ["cat 0.98", "dog 0.97", "cow 0.96"]

    def painted(group: int, **options: object) -> int:
        drawn = np.asarray(draw_boxes(grey(640, 480), boxes, **options))
        return int((drawn == class_colour(group)).all(axis=2).sum())

    bare = painted(0)
    for group in (1, 2):  # their outlines lie under that of group 0
        chip = painted(0, captions=[captions[group], "", ""]) - bare
        assert painted(group, captions=captions, groups=[0, 1, 2]) > 0.8 * chip


def test_in_a_crowd_captions_leave_most_of_the_picture_free():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 460, (300, 2))
    boxes = np.hstack([corners, corners + 20])
    bare = draw_boxes(grey(480, 480), boxes)
    captioned = draw_boxes(grey(480, 480), boxes, captions=["nucleus 0.98"] * 300)
    assert (np.asarray(bare) != np.asarray(captioned)).any(axis=2).mean() < drawing.MOST_COVERED


def test_a_caption_too_wide_for_the_picture_is_shortened():
    drawn = draw_boxes(grey(480, 480), np.array([[10, 100, 50, 140]]), captions=["very long name " * 20])
    assert changed(drawn)[2] <= 480
    assert changed(drawn)[2] > 440


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.lists(st.tuples(*[st.floats(-50, 350)] * 4), max_size=6),
    st.text(max_size=12),
)
@settings(max_examples=40, deadline=None)
def test_any_box_and_caption_can_be_drawn(size, boxes, caption):
    array = np.reshape(boxes, (-1, 4))
    drawn = draw_boxes(grey(*size), array, captions=[caption] * len(array), groups=range(len(array)))
    assert drawn.mode == "RGB"
    assert drawn.width % size[0] == 0
    assert drawn.height % size[1] == 0


def test_the_same_input_gives_the_same_picture():
    boxes = np.random.default_rng(0).uniform(0, 240, (40, 4)).cumsum(axis=1) / 2
    captions = [f"class {index}" for index in range(40)]
    first, second = (draw_boxes(grey(640, 480), boxes, captions=captions, groups=range(40)) for _ in "ab")
    assert first.tobytes() == second.tobytes()


# Colours


def test_colours_differ_and_captions_on_them_can_be_read():
    colours = [class_colour(group) for group in range(80)]
    assert len(set(colours)) == 80
    for one, other in itertools.combinations(colours[:9], 2):
        assert np.abs(np.subtract(one, other)).max() > 50
    for colour in colours:
        assert contrast(colour, drawing._contrast(colour)) >= 4.5  # WCAG AA


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    def luminance(colour: tuple[int, ...]) -> float:
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in colour]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, r"needs a uint8 image \[H, W, 3\]; got uint8 \[4, 4\]"),
        ({"image": np.zeros((4, 4, 3))}, "got float64"),
        ({"boxes": np.zeros((1, 5))}, r"needs finite boxes \[N, 4\]; got \[1, 5\]"),
        ({"boxes": np.full((1, 4), np.nan)}, "finite"),
        ({"captions": ["a", "b"]}, "one caption a box; got 2 for 1 boxes"),
        ({"groups": []}, "one group a box; got 0 for 1 boxes"),
        ({"groups": [-1]}, r"needs groups from 0; got -1\.\.-1"),
        ({"groups": [1], "colours": [(0, 0, 0)]}, r"groups 0\.\.0, one for each colour; got 1\.\.1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    good = {"image": grey(8, 8), "boxes": np.array([[1, 1, 4, 4.0]])}
    with pytest.raises(DataError, match=message):
        draw_boxes(**{**good, **arguments})


# Sheets


def test_a_sheet_holds_every_tile_unscaled_on_a_light_page():
    tiles = [Image.new("RGB", (100, 80), class_colour(index)) for index in range(5)]
    sheet = np.asarray(contact_sheet(tiles, columns=2))
    assert (sheet[0, 0] > 240).all()
    for index in range(5):
        rows, columns = np.nonzero((sheet == class_colour(index)).all(axis=2))
        assert len(rows) == 100 * 80
        assert (columns.min() > 100) == (index % 2 == 1)
        assert 80 * (index // 2) < rows.min()
        assert rows.max() < 110 * (index // 2 + 1)


def test_captions_and_title_take_room_of_their_own():
    tiles = [Image.new("RGB", (100, 80), ORANGE)] * 2
    plain = contact_sheet(tiles, columns=2)
    with_captions = contact_sheet(tiles, columns=2, captions=["left", "right"])
    with_title = contact_sheet(tiles, columns=2, captions=["left", "right"], title="A title")
    assert plain.height < with_captions.height < with_title.height
    assert plain.width == with_captions.width == with_title.width
    assert (np.asarray(with_title) == ORANGE).all(axis=2).sum() == 2 * 100 * 80
    assert side_by_side(*tiles, "left", "right").tobytes() == with_captions.tobytes()


def test_large_tiles_are_scaled_down_and_columns_are_as_many_as_tiles():
    sheet = contact_sheet([Image.new("RGB", (3000, 1500), ORANGE)], columns=4)
    assert (np.asarray(sheet) == ORANGE).all(axis=2).sum() == 720 * 360
    assert sheet.width < 800


def test_impossible_sheets_are_refused():
    tile = Image.new("RGB", (10, 10))
    with pytest.raises(ConfigError, match="needs tiles and columns, one of each at least; got 0 and 2"):
        contact_sheet([], columns=2)
    with pytest.raises(ConfigError, match="got 1 and 0"):
        contact_sheet([tile], columns=0)
    with pytest.raises(ConfigError, match="one caption a tile; got 2 for 1 tiles"):
        contact_sheet([tile], columns=1, captions=["a", "b"])


# Files


@pytest.mark.parametrize(("name", "form"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG")])
def test_pictures_are_saved_as_their_suffix_says(name, form, tmp_path):
    for colour in (ORANGE, SKY):  # the second replaces the first
        save_image(Image.new("RGB", (16, 16), colour), tmp_path / name)
    with Image.open(tmp_path / name) as saved:
        assert saved.format == form
        np.testing.assert_allclose(saved.getpixel((8, 8)), SKY, atol=3)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt"])
def test_an_unknown_suffix_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=r"is saved as \.jpg, \.jpeg or \.png; got suffix"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / name)


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match=r"a\.png: cannot be written \(No such file or directory\)"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "nowhere" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png: cannot be written"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
