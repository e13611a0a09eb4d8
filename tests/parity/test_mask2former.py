"""The detector for photographs: planted objects come back in place, and random networks run through."""

import json
import types

import numpy as np
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.evals import detectors, mask2former

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PICTURE = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)


class Planted(torch.nn.Module):
    """Answers with two objects of known confidence, and two too weak to count, at a quarter of the input's size."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.config = types.SimpleNamespace(id2label={0: "cat", 1: "dog"})

    def forward(self, pixel_values, pixel_mask):
        self.valid = pixel_mask.sum(dim=(1, 2)), pixel_values.shape
        height, width = pixel_values.shape[2] // 4, pixel_values.shape[3] // 4
        masks = torch.full((1, 4, height, width), -8.0)
        masks[0, 0, : height // 2, : width // 2] = 8.0
        masks[0, 1, height // 2 :, width // 4 : width // 2] = 8.0
        masks[0, 2, :2, :2] = 8.0
        masks[0, 3, :2, :2] = 0.2  # a class that would do, a mask that is not sure
        classes = torch.log(torch.tensor([[[0.6, 0.1, 0.3], [0.04, 0.95, 0.01], [0.25, 0.05, 0.7], [0.5, 0.0, 0.5]]]))
        return types.SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def test_planted_objects_are_found_in_place():
    seen = []

    def name_colors(crops, labels):
        seen.extend(zip(labels, crops))
        return ["red", "blue"]

    found = mask2former.Mask2FormerDetector(Planted(), name_colors, short_side=64)(PICTURE)
    assert [(d.label, d.color) for d in found] == [("dog", "red"), ("cat", "blue")]
    assert found[0].score == pytest.approx(0.93, abs=0.03) and found[1].score == pytest.approx(0.59, abs=0.03)
    np.testing.assert_allclose(found[1].box, (0, 0, 45, 30), atol=1.5)
    np.testing.assert_allclose(found[0].box, (22.5, 30, 45, 60), atol=1.5)
    label, crop = seen[1]
    x1, y1 = (int(edge) for edge in found[1].box[2:])
    assert label == "cat" and crop.shape == (y1, x1, 3)
    np.testing.assert_array_equal(crop[:25, :40], PICTURE[:25, :40])


def test_the_input_is_scaled_and_padded_for_the_network():
    network = Planted()
    mask2former.Mask2FormerDetector(network, lambda crops, labels: ["red"] * len(crops), short_side=70)(PICTURE)
    (valid,), shape = network.valid
    assert shape == (1, 3, 96, 128) and valid == 70 * 105


def test_a_crop_shows_the_object_on_grey():
    mask = np.zeros((60, 90), bool)
    mask[10:20, 30:50] = True
    mask[12, 33] = False
    crop = mask2former._cut_out(PICTURE, mask, mask2former._box(mask))
    assert crop.shape == (10, 20, 3) and (crop[2, 3] == mask2former.GREY).all()
    np.testing.assert_array_equal(crop[0], PICTURE[10, 30:50])


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Directories of a tiny random Mask2Former and a tiny random CLIP."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=80,
    )  # fmt: skip
    network = transformers.Mask2FormerForUniversalSegmentation(config)
    network.save_pretrained(root / "network")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz-",
        *(c + "</w>" for c in "abcdefghijklmnopqrstuvwxyz-"),
    ]
    (root / "clip").mkdir()
    (root / "clip" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "clip" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(tower, vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1),
            vision_config=dict(tower, image_size=32, patch_size=16),
            projection_dim=8,
        )
    )
    clip.save_pretrained(root / "clip")
    return root


def test_random_networks_run_through(networks, monkeypatch):
    monkeypatch.setattr(mask2former, "LEAST_SCORE", 0.0)
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    detector = detectors.open_detector("mask2former", str(networks / "network"), str(networks / "clip"))
    assert detector.thresholds.counting == 0.9 and str(networks / "clip") in detectors.load(detector)
    assert set(detector.vocabulary.classes) == set(mask2former.COCO_NAMES)
    detector._detector._short_side = 64
    found = detector(PICTURE)
    assert found and [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    assert {d.label for d in found} <= set(mask2former.COCO_NAMES) and {d.color for d in found} <= set(
        mask2former.COLORS
    )
    assert all(0 <= d.box[0] < d.box[2] <= 90 and 0 <= d.box[1] < d.box[3] <= 60 for d in found)


class Pooled(torch.nn.Module):
    """Sees the same in every crop."""

    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, pixel_values):
        return types.SimpleNamespace(pooler_output=self.view[None].repeat(len(pixel_values), 1))


def test_colors_are_those_of_the_nearest_phrases(networks):
    model = transformers.CLIPModel.from_pretrained(networks / "clip")
    names = mask2former.ColorNames(model, transformers.AutoTokenizer.from_pretrained(networks / "clip"))
    with torch.no_grad():
        vectors = names._colors_of("cat")
    assert vectors.shape == (10, 8)
    model.visual_projection = torch.nn.Identity()
    for index in (6, 9):
        model.vision_model = Pooled(vectors[index])
        assert names([PICTURE, PICTURE[:5, :40]], ["cat", "cat"]) == [mask2former.COLORS[index]] * 2


def test_a_missing_network_is_named(tmp_path):
    with pytest.raises(UserError, match="pass --model and --clip"):
        assert mask2former.Mask2Former(str(tmp_path / "none"), str(tmp_path / "none")).vocabulary
    with pytest.raises(UserError, match="pass --model and --clip"):
        mask2former.Mask2Former(clip=str(tmp_path / "none")).load()


def test_class_names_are_those_of_the_benchmark():
    assert len(set(mask2former.COCO_NAMES)) == 80
    assert mask2former.COCO_NAMES[64:68] == ("computer mouse", "tv remote", "computer keyboard", "cell phone")
