"""Images: the one decoder, the one preprocessing, and the way back. NumPy and Pillow only.

An image is what a person sees: RGB, upright (EXIF orientation applied exactly once), opaque. Every
box of this library lives in that frame; `Geometry` carries boxes to the network's frame and back.
"""

from retinanet.images.decoding import (
    BACKGROUND,
    FORMATS,
    MAX_PIXELS,
    Examined,
    ImageSource,
    UInt8Array,
    decode,
    examine,
    read_size,
)
from retinanet.images.preprocessing import Float32Array, Geometry, Preprocessing, pad_to, stack

__all__ = [
    "BACKGROUND",
    "FORMATS",
    "MAX_PIXELS",
    "Examined",
    "Float32Array",
    "Geometry",
    "ImageSource",
    "Preprocessing",
    "UInt8Array",
    "decode",
    "examine",
    "pad_to",
    "read_size",
    "stack",
]
