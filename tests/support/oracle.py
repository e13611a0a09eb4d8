"""A stand-in for a pipeline that paints every case of an examination rightly, so that wiring shows in the scores."""

import dataclasses

import numpy as np
from PIL import Image

from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.demo.world.render import render
from blip3o_jax.generate.settings import Settings
from blip3o_jax.pipeline import PipelineOutput

SIZE = 64


class Oracle:
    """Knows the scenes of `cases`; paints them at 64 pixels. `blank` paints nothing instead."""

    def __init__(self, cases=(), edits=True, blank=False):
        self.config = dataclasses.replace(preset("demo"), edit=EditConfig(vae_condition=edits))
        self.dtype, self.params, self.name, self.blank, self.calls, self.requests = (
            "float32",
            {},
            "oracle",
            blank,
            [],
            [],
        )
        self.scenes = {}
        for case in cases:
            scene = case.truth.target if case.tag == "edit" else case.truth.scene
            self.scenes[self._key(case.prompt, [] if case.given is None else [render(case.given, SIZE)])] = scene

    def _key(self, text, references):
        return text, b"".join(np.asarray(reference).tobytes() for reference in references)

    def scope(self):
        return Image.new("RGB", (1, 1))  # any context

    def _output(self, pictures):
        return PipelineOutput(
            [Image.fromarray(p) for p in pictures], np.zeros((1, 1)), np.zeros((1, 1)), np.ones(1, np.int32), {}
        )

    def answer(self, requests, **settings):
        (output,) = self.stream(requests, **settings | {"batch_size": 1000})
        return output

    def stream(self, requests, **settings):
        settings = Settings(**settings)
        self.calls.append((requests[0].task, len(requests)))
        self.requests += requests
        pictures = []
        for request in requests:
            picture = np.full((SIZE, SIZE, 3), 245, np.uint8)
            if not self.blank:
                picture = render(self.scenes[self._key(request.text, request.references)], SIZE)
            pictures += [picture] * settings.num_images_per_prompt
        for first in range(0, len(pictures), settings.batch_size):
            yield self._output(pictures[first : first + settings.batch_size])

    def render(self, requests, **settings):
        blank = np.full((SIZE, SIZE, 3), 245, np.uint8)
        for request in requests:
            yield self._output([blank if self.blank else np.asarray(request.target)])
