"""Reading data sets: one `Dataset` whatever the format. This room's readers know no torch.

Every reader ends in a valid `Dataset` or a `DataError`. What has one meaning is repaired, what has none is
dropped, and both are named in `Dataset.faults`; nothing is ever written into a data set that was read.
"""

from retinanet.data.coco import read_coco, write_coco
from retinanet.data.converting import Conversion, convert_dataset
from retinanet.data.csv_files import read_csv
from retinanet.data.dataset import Dataset, Fault
from retinanet.data.hugging_face import read_hugging_face
from retinanet.data.open_images import read_open_images
from retinanet.data.opening import available_splits, open_dataset, read_as
from retinanet.data.splitting import split_dataset
from retinanet.data.voc import read_voc
from retinanet.data.yolo import read_yolo

__all__ = [
    "Conversion",
    "Dataset",
    "Fault",
    "available_splits",
    "convert_dataset",
    "open_dataset",
    "read_as",
    "read_coco",
    "read_csv",
    "read_hugging_face",
    "read_open_images",
    "read_voc",
    "read_yolo",
    "split_dataset",
    "write_coco",
]
