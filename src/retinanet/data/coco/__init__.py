"""COCO JSON: `{"images": [...], "annotations": [...], "categories": [...]}`, boxes as [x, y, width, height].

Format: https://cocodataset.org/#format-data
"""

from retinanet.data.coco.reading import read_coco
from retinanet.data.coco.writing import write_coco

__all__ = ["read_coco", "write_coco"]
