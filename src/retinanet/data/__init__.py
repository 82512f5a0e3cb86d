"""Reading data sets: one `Dataset` whatever the format. This room's readers know no torch.

Every reader ends in a valid `Dataset` or a `DataError`. What has one meaning is repaired, what has none is
dropped, and both are named in `Dataset.faults`; nothing is ever written into a data set that was read.
"""

from retinanet.data.coco import read_coco, write_coco
from retinanet.data.dataset import Dataset, Fault
from retinanet.data.opening import available_splits, open_dataset
from retinanet.data.voc import read_voc

__all__ = ["Dataset", "Fault", "available_splits", "open_dataset", "read_coco", "read_voc", "write_coco"]
