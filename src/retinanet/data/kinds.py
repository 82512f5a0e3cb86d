"""What can be wrong with a data set, in words that are the same in every format, and what to do about each."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """A sort of fault: equal to its words (`Kind.REVERSED_BOX == "reversed box"`), with a `fix` for people."""

    fix: str

    def __new__(cls, words: str, fix: str) -> Kind:
        member = str.__new__(cls, words)
        member._value_ = words
        member.fix = fix
        return member

    # Boxes
    NOT_A_NUMBER = "not a number", "Write the box as four numbers, or remove it"
    NOT_FINITE = "not finite", "Draw the box again, or remove it"
    REVERSED_BOX = "reversed box", "Write the smaller corner first"
    EMPTY_BOX = "empty box", "Draw the box again, with a width and a height, or remove it"
    EQUAL_CORNERS = "equal corners", "A click, not a box: draw the object again, or remove it"
    OUTSIDE_IMAGE = (
        "outside image",
        "Draw the box inside its image; where there are many, the images were resized, turned or exchanged after "
        "they were annotated",
    )
    DUPLICATE_BOX = "duplicate box", "Remove the second of the two equal annotations"
    INVALID_AREA = "invalid area", "Write the object's area in square pixels, or leave it out"
    # References
    UNKNOWN_CLASS = "unknown class", "Add the class to the list of classes, or correct the annotation"
    MISSING_CLASS = "missing class", "Write the name of the object's class"
    ORPHAN_ANNOTATION = "orphan annotation", "Add the image to the list of images, or remove the annotation"
    # Ids
    MISSING_ID = "missing id", "Give the record an id, a whole number or text"
    DUPLICATE_ID = "duplicate id", "Number the annotations 1, 2, 3 ..."
    MIXED_IDS = "mixed ids", "Write all image ids as whole numbers, or all as text"
    # Files
    BAD_FILE_NAME = "bad file name", "Write the path of the image file, relative to the data set"
    PATH_ELSEWHERE = "path elsewhere", "Write the path relative to the data set's own folder"
    MISSING_IMAGE = "missing image", "Put the image file there, or remove it from the list"
    DUPLICATE_LISTING = "duplicate listing", "List every image once"
    UNLISTED_IMAGE = (
        "unlisted image",
        "Annotate the image or list it without boxes; remove it if it is not meant",
    )
    MISSING_ANNOTATION = (
        "missing annotation",
        "Add the annotation file; for an image without objects, an XML file whose <annotation> holds no <object>",
    )
    # Tables and label files
    WRONG_COLUMNS = "wrong columns", "Give every line the columns of the format"
    INCOMPLETE_ROW = (
        "incomplete row",
        "Fill in all columns; a row with the path alone is an image without objects",
    )
    UNREADABLE_LABELS = "unreadable labels", "Write the labels again, as text in UTF-8"
    # Images
    MISSING_SIZE = "missing size", "Write the width and height of the image, in pixels"
    OTHER_SIZE = (
        "other size",
        "Scale the boxes as the image was scaled, or put the image back that was annotated",
    )
    ROTATED_LABELS = (
        "rotated labels",
        "Turn the pixels upright and remove the EXIF orientation, or annotate the image as a viewer shows it",
    )
    UNREADABLE_IMAGE = (
        "unreadable image",
        "Replace the file by a sound JPEG, PNG, BMP, GIF, PPM, TIFF or WebP",
    )
    TRUNCATED_IMAGE = "truncated image", "Copy or download the file again: its end is missing"
    HUGE_IMAGE = "huge image", "Scale the image down, or cut it into tiles"
    ANIMATED_IMAGE = "animated image", "Save the frame that was annotated as an image of its own"
    DARK_IMAGE = (
        "dark image",
        "Spread the values over 0 to 65535, all images alike (those of a 12-bit camera times 16), or save 8 bits",
    )
