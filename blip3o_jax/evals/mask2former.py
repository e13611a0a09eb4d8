"""A detector for photographs: Mask2Former detects objects, CLIP classifies their colours. Needs torch and transformers.

Y X pixels of the image, K crops.

Source: Mask2Former (Cheng et al. 2022), where the score of an instance is that of its class times that of its mask;
GenEval benchmark for thresholds, colours, three phrases per colour, and crops on grey.
Differs from the benchmark: transformers' ports of Mask2Former and CLIP instead of mmdetection and open_clip.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.detection import Detection, Vocabulary
from blip3o_jax.errors import UserError
from blip3o_jax.evals.geneval import MAX_OBJECTS, OFFICIAL_THRESHOLDS

NETWORK = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PHRASES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's classes in the order of their numbers, with GenEval's names."""

LEAST_SCORE = 0.3  # lowest confidence that the benchmark counts
MAX_INSTANCES = 100
SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32  # of the network's input, in pixels
GREY = 153  # background of a crop
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Mask2Former:
    """The detector `mask2former`, which loads its networks on first use; see `detection.Detector`.

    Args:
      model: directory or name of a Mask2Former for instance segmentation; None for NETWORK.
      clip: directory or name of a CLIP model; None for CLIP.
    """

    thresholds = OFFICIAL_THRESHOLDS

    def __init__(self, model: str | None = None, clip: str | None = None):
        self._model, self._clip = model or NETWORK, clip or CLIP

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The classes according to the configuration of the network."""
        names = COCO_NAMES
        if self._model != NETWORK:
            _, transformers = _libraries()
            with self._loading():
                names = class_names(transformers.AutoConfig.from_pretrained(self._model).id2label)
        return Vocabulary(dict.fromkeys(names, MAX_OBJECTS), COLORS)

    def load(self) -> str:
        """Loads both networks; raises UserError if a library or a model is missing."""
        assert self._detector
        return f"detector: {self._model}, colours by {self._clip}"

    def __call__(self, image: np.ndarray) -> list[Detection]:
        return self._detector(image)

    @functools.cached_property
    def _detector(self) -> "Mask2FormerDetector":
        """Both networks, on a GPU if torch has one."""
        torch, transformers = _libraries()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with self._loading():
            segmenter = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(self._model)
            describer = transformers.CLIPModel.from_pretrained(self._clip)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._clip)
        return Mask2FormerDetector(segmenter.to(device), ColorNames(describer.to(device), tokenizer))

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Converts errors of loading to UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            got, do = " ".join(str(error).split())[:200], "download them or pass --model and --clip"
            expected = f"{self._model} and {self._clip} in the local cache or at these paths"
            raise UserError("detector mask2former", got=got, expected=expected, do=do) from error


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        expected, do = "torch and transformers", "pip install 'blip3o_jax[detector]'"
        raise UserError(f"detector mask2former: {error}", expected=expected, do=do) from error
    return torch, transformers


def class_names(known: Mapping[int, str]) -> Sequence[str]:
    """Returns the class names of a network by number; those of COCO as in GenEval's prompts."""
    return COCO_NAMES if len(known) == len(COCO_NAMES) else [known[number] for number in sorted(known)]


class Mask2FormerDetector:
    """Detects objects with a torch network; see `detection.Detector`."""

    def __init__(
        self,
        network: Any,
        name_colors: Callable[[Sequence[np.ndarray], Sequence[str]], list[str]],
        short_side: int = SHORT_SIDE,
    ):
        """`name_colors`: crops uint8[Y X 3] and their classes -> names of their colours."""
        self._network, self._name_colors, self._short_side = network.eval(), name_colors, short_side
        self._labels = class_names(network.config.id2label)

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """Detects instances in uint8[Y X 3] with a confidence of at least LEAST_SCORE, by falling confidence."""
        found = sorted(self._instances(image), key=lambda instance: -instance[1])
        crops = [_cut_out(image, mask, box) for _, _, box, mask in found]
        colors = self._name_colors(crops, [label for label, *_ in found]) if found else []
        return [
            Detection(label, color, box, score) for (label, score, box, _), color in zip(found, colors, strict=True)
        ]

    def _instances(self, image: np.ndarray) -> list[tuple[str, float, tuple[float, ...], np.ndarray]]:
        """Returns class, confidence, box and mask bool[Y X] of every instance."""
        import torch

        resized, size = self._resized(image), image.shape[:2]
        height, width = resized.shape[:2]
        padded = [-(-side // MULTIPLE) * MULTIPLE for side in (height, width)]
        pixels, valid = np.zeros((1, 3, *padded), np.float32), np.zeros((1, *padded), np.int64)
        pixels[0, :, :height, :width] = _normalized(resized, MEAN, DEVIATION)
        valid[0, :height, :width] = 1
        device = next(self._network.parameters()).device
        with torch.no_grad():
            out = self._network(
                pixel_values=torch.from_numpy(pixels).to(device), pixel_mask=torch.from_numpy(valid).to(device)
            )
            classes = out.class_queries_logits[0].float().softmax(-1)[:, :-1]  # the last class is "nothing"
            scores, places = classes.flatten().topk(min(MAX_INSTANCES, classes.numel()))
            found = []
            for score, place in zip(scores.tolist(), places.tolist()):
                if score < LEAST_SCORE:  # the mask's confidence is at most 1
                    break
                query, label = divmod(place, classes.shape[1])
                logits = out.masks_queries_logits[0, query].float()
                mask, sure = _mask(logits, padded, (height, width), size)
                if mask.any() and score * sure >= LEAST_SCORE:
                    found.append((self._labels[label], score * sure, _box(mask), mask))
        return found

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """Resizes an image to the network's shorter side, or less if the longer side would exceed its limit."""
        height, width = image.shape[:2]
        limit = LONG_SIDE * self._short_side / SHORT_SIDE
        scale = min(self._short_side / min(height, width), limit / max(height, width))
        size = [max(round(side * scale), 1) for side in (width, height)]
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _mask(logits, padded: Sequence[int], valid: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Returns the mask bool[Y X] of one query and its confidence."""
    import torch.nn.functional as F

    resize = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
    full = resize(logits[None, None], size=tuple(padded))[..., : valid[0], : valid[1]]
    full = resize(full, size=size)[0, 0]
    inside = full > 0
    sure = float((full.sigmoid() * inside).sum() / inside.sum().clamp(min=1))
    return inside.cpu().numpy(), sure


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _cut_out(image: np.ndarray, mask: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """Crops an object, with a grey background."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    return np.where(mask[..., None], image, np.uint8(GREY))[y0:y1, x0:x1]


def _normalized(image: np.ndarray, mean: tuple[float, ...], deviation: tuple[float, ...]) -> np.ndarray:
    """Normalises uint8[Y X 3] to f32[3 Y X]."""
    return np.moveaxis((image.astype(np.float32) / 255 - mean) / deviation, -1, 0)


class ColorNames:
    """Classifies colours with a `CLIPModel` and its tokenizer, by the nearest phrases."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model, self._tokenizer = model.eval(), tokenizer
        self._size = model.config.vision_config.image_size
        self._phrases: dict[str, Any] = {}

    def __call__(self, crops: Sequence[np.ndarray], labels: Sequence[str]) -> list[str]:
        """Classifies K crops uint8[Y X 3] of given classes; returns K of COLORS."""
        import torch

        pixels = torch.from_numpy(np.stack([self._input(crop) for crop in crops]).astype(np.float32))
        with torch.no_grad():
            pooled = self._model.vision_model(pixel_values=pixels.to(self._model.device)).pooler_output
            views = _unit(self._model.visual_projection(pooled))
            nearest = [(self._colors_of(label) @ view).argmax() for view, label in zip(views, labels)]
        return [COLORS[int(index)] for index in nearest]

    def _colors_of(self, label: str):
        """Returns a unit vector per colour for objects of a class: the mean over phrases."""
        if label not in self._phrases:
            texts = [phrase.format(color=color, label=label) for color in COLORS for phrase in PHRASES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
            pooled = self._model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            vectors = _unit(self._model.text_projection(pooled))
            self._phrases[label] = _unit(vectors.reshape(len(COLORS), len(PHRASES), -1).mean(1))
        return self._phrases[label]

    def _input(self, crop: np.ndarray) -> np.ndarray:
        """Resizes, centre-crops and normalises a crop."""
        height, width = crop.shape[:2]
        scale = self._size / min(height, width)
        rows, columns = (max(round(side * scale), self._size) for side in (height, width))
        picture = Image.fromarray(crop).resize((columns, rows), Image.Resampling.BICUBIC)
        left, top = (columns - self._size) // 2, (rows - self._size) // 2
        square = picture.crop((left, top, left + self._size, top + self._size))
        return _normalized(np.asarray(square), CLIP_MEAN, CLIP_DEVIATION)


def _unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)
