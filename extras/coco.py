"""Read COCO for extras/detect.py, measure average precision, draw pictures.

pycocotools reads the annotations and measures; it is asked for where it is missing.

n objects, (H, W) pixels; boxes are (x0, y0, x1, y1), labels count from 1
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from support.errors import UserError
from support.files import decode

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    COCO = None

MASK, DRAWN = 0.5, 0.5    # probability of a mask's pixel; score of a detection in a picture


class CocoImages(Dataset):
    """A split of COCO: (image (3, H, W), target), of torchvision's tv_tensors.

    target: boxes (n, 4) float32, masks (n, H, W) uint8, labels (n,) int64. Crowds, and objects less
    than a pixel wide or high, are no targets. `with_objects` are the indices of images that have
    any, `coco` is pycocotools' index of all. Raises UserError.
    """

    def __init__(self, path, split):
        if COCO is None:
            raise UserError("COCO needs pycocotools: pip install pycocotools")
        self.folder = Path(path) / f"{split}2017"
        file = Path(path) / "annotations" / f"instances_{split}2017.json"
        if missing := [str(place) for place in (self.folder, file) if not place.exists()]:
            raise UserError(f"{missing[0]} is missing: --data_path {path} must hold train2017/, "
                            "val2017/ and annotations/instances_{train,val}2017.json")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(file)
            categories = self.coco.dataset["categories"]
            self.names = {entry["id"]: entry["name"] for entry in categories}    # by category id
            self.categories = sorted(self.names)    # category ids have gaps, labels have none
            self.labels = {category: i for i, category in enumerate(self.categories, start=1)}
            self.ids = sorted(self.coco.imgs)
            self.objects = [[a for a in self.coco.imgToAnns[image] if self.is_target(a)]
                            for image in self.ids]
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is no instances JSON of COCO: {error!r}") from error
        self.with_objects = [i for i, objects in enumerate(self.objects) if objects]

    def is_target(self, a):
        """Return whether an annotation is trained on.

        Raises KeyError for an unknown category.
        """
        (x, y, w, h), image = a["bbox"], self.coco.imgs[a["image_id"]]
        w, h = min(x + w, image["width"]) - max(x, 0), min(y + h, image["height"]) - max(y, 0)
        known = self.labels[a["category_id"]] > 0
        return known and not a["iscrowd"] and len(a["segmentation"]) > 0 and min(w, h) >= 1

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        entry, objects = self.coco.imgs[self.ids[i]], self.objects[i]
        path, size = self.folder / entry["file_name"], (entry["height"], entry["width"])
        image = decode(path, upright=False)
        if image.shape[1:] != size:
            raise UserError(f"{path} has not the size in its JSON")
        boxes = torch.tensor([a["bbox"] for a in objects]).view(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), size)
        masks = np.stack([self.coco.annToMask(a) for a in objects] or [np.zeros(size, np.uint8)])
        labels = [self.labels[a["category_id"]] for a in objects]
        return tv_tensors.Image(image), {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "masks": tv_tensors.Mask(masks[: len(objects)]),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }

    def results(self, i, found):
        """Turn detections in image i into entries of COCO's result format.

        found: boxes, scores, labels, and masks (n, 1, H, W), probabilities.
        """
        masks = (found["masks"][:, 0] > MASK).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
        codes = rle.encode(np.asfortranarray(masks))
        boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
        return [{"image_id": self.ids[i], "category_id": self.categories[label - 1], "bbox": box,
                 "score": score, "segmentation": code | {"counts": code["counts"].decode()}}
                for label, score, box, code in
                zip(found["labels"].tolist(), found["scores"].tolist(), boxes, codes)]


def average_precision(coco, results):
    """Return {"box": {"AP", "AP50", "AP75"}, "mask": ...} in %; coco: of CocoImages."""
    scores = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        values = [0.0] * 3
        if results:    # pycocotools can't read an empty list
            with contextlib.redirect_stdout(io.StringIO()):    # its tables
                evaluation = COCOeval(coco, coco.loadRes(results), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = evaluation.stats[:3].tolist()
        scores[name] = dict(zip(("AP", "AP50", "AP75"), (100 * value for value in values)))
    return scores


def draw_objects(image, target, names):
    """Draw boxes, masks (n, H, W) and names into a uint8 image (3, H, W)."""
    if not len(target["boxes"]):
        return image
    hues = (137 * i % 360 for i in range(len(target["boxes"])))    # neighbors differ most
    colors = [ImageColor.getrgb(f"hsl({hue}, 90%, 40%)") for hue in hues]
    for mask, color in zip(target["masks"].bool(), colors):    # all at once, overlaps become black
        image = draw_segmentation_masks(image, mask, alpha=0.4, colors=[color])
    return draw_bounding_boxes(
        image, target["boxes"], names, colors, width=2, label_colors="white", fill_labels=True)


def draw_pictures(path, detect, images, number):
    """Draw truth and detections in the first images of a CocoImages, a row an image.

    detect: image -> detections, as CocoImages.results takes them.
    """
    rows, names = [], [images.names[category] for category in images.categories]
    for i in range(min(number, len(images))):
        image, target = images[i]
        found = detect(image)
        sure = {name: x[found["scores"] > DRAWN].cpu() for name, x in found.items()}
        sure["masks"] = sure["masks"][:, 0] > MASK
        pair = [draw_objects(image.as_subclass(torch.Tensor), objects,
                             [names[label - 1] for label in objects["labels"].tolist()])
                for objects in (target, sure)]
        rows.append(torch.cat([F.pad(picture, (2, 2, 2, 2), value=255) for picture in pair], dim=2))
    width = max(row.shape[2] for row in rows)
    rows = [F.pad(row, (0, width - row.shape[2]), value=255) for row in rows]
    to_pil_image(torch.cat(rows, dim=1)).save(path)
