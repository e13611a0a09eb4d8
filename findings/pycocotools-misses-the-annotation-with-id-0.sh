#!/usr/bin/env bash
# pycocotools, COCOeval: the annotation with id 0 can not be found by any detector. A detector that returns the ground truth
# itself has an AP of 1.0 when the annotations are numbered from 1, and 0.44 for the same three boxes numbered from 0; the
# category that has only this annotation has AP 0. It counts as missed, and the detection that found it as a false alarm, which
# also lowers the precision of all that score less. So it is for boxes, masks and keypoints.
# The format asks for "id": int, and data written by a script (enumerate, the index of a table) begins at 0; images and
# categories may have id 0. Nothing is raised or logged, loading and showing the annotations work, and on a large set the
# error is a thousandth that moves with the order of the annotations. It hurts small sets the most: a rare category, or a set
# for checking a detector that scores generated images.
# COCOeval keeps the id of the matched annotation for each detection, and takes 0 for "no match". Its header says so of the
# internal field dtMatches ("matching gt id at each IoU or 0"); that ids must not be 0 it does not say. With negative ids the
# result is right. maxDets and thresholds do not matter.
# Right is to number annotations from 1. Here with pycocotools 2.0.11. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pycocotools==2.0.11' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/evaluate.py" <<'PYTHON'
import contextlib
import importlib.metadata
import io
import sys

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SQUARE = [10.0, 10.0, 60.0, 10.0, 60.0, 60.0, 10.0, 60.0]  # x, y of the corners


def evaluate(first, kind, categories=1):
    """AP and AR of the ground truth itself as detections, of three images with one object each, numbered from `first`."""
    truth = COCO()
    objects = [
        {
            "image_id": image,
            "category_id": image % categories,
            "bbox": [10, 10, 50, 50],
            "segmentation": [SQUARE],
            "keypoints": [20, 20, 2] * 17,
        }
        for image in range(3)
    ]
    more = {"area": 2500, "iscrowd": 0, "num_keypoints": 17}
    truth.dataset = {
        "info": {},
        "images": [{"id": image, "width": 100, "height": 100} for image in range(3)],
        "categories": [{"id": category, "name": f"class {category}"} for category in range(categories)],
        "annotations": [one | more | {"id": first + number} for number, one in enumerate(objects)],
    }
    keys = {"bbox": "bbox", "segm": "bbox", "keypoints": "keypoints"}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = [{key: one[key] for key in ("image_id", "category_id", keys[kind])} | {"score": 0.9} for one in objects]
        if kind == "segm":
            for one, annotation in zip(found, truth.dataset["annotations"], strict=True):
                del one["bbox"]
                one["segmentation"] = truth.annToRLE(annotation)
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, categories
    return float(evaluation.stats[0]), [float(precision[:, :, category].mean()) for category in range(categories)]


print("pycocotools", importlib.metadata.version("pycocotools"))
ok = []
for kind in ("bbox", "segm", "keypoints"):
    for first in (1, -3, 0):
        average, _ = evaluate(first, kind)
        print(f"{kind}, the ground truth as detections, annotations from id {first}: AP {average:.3f}, expected 1.000")
        ok.append(average < 0.7 if first == 0 else average > 0.999)
for first in (1, 0):
    _, each = evaluate(first, "bbox", categories=3)
    print(f"bbox, one object for each class, annotations from id {first}: AP of the classes", *(f"{ap:.3f}" for ap in each))
    ok.append([round(ap, 3) for ap in each] == [first, 1, 1])
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/evaluate.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
