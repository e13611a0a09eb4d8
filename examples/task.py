"""Image-to-image tasks from outside the package: depth and segmentation, each with a message of its own.

Sample with it, from this directory:

    python ../sample.py --checkpoint MODEL --task task:depth --image photo.png

Train on it: rows whose target is the depth map and whose reference is the photo, as for edits,

    config.data.sources = [{"kind": "jsonl", "path": "depth.jsonl", "task": "task:depth"}]
"""

from blip3o_jax.text.tasks import Task

depth = Task(
    message="Please estimate the depth of this image, {text}.\n{images}",
    default_text="near is white and far is black",  # so that no row needs a text of its own
)

segmentation = Task(message="Please paint every {text} of this image white and all else black.\n{images}")
