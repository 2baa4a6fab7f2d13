"""A model that draws without weights, for tests of the server: the colours of its prompt."""

import threading

import numpy as np
from PIL import Image

from magma_jax.data.images import ImageInput
from magma_jax.inference.answers import Answer, Canvas
from tests import tiny

SIZE, TOKENS = 32, 16
GREY = (128, 128, 128)


class Drawer:
    """Draws squares of the colour that the prompt names: top to bottom, one part for each preview.

    Its ``go`` holds it up before every canvas while it is cleared; ``drawn`` lists the prompts it began.
    """

    makes = frozenset({"text", "image", "edit"})
    image_size, image_tokens = SIZE, TOKENS

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        self.drawn = []

    def text_tokens(self, text):
        return len(text.split())

    def warm_up(self, rows):
        pass

    def answers(self, prompts, options=None, *, count=None):
        """The prompt's texts in capitals, and between them its images."""
        for prompt in prompts:
            self.drawn.append((prompt, options))
            if prompt[-1] == "too long":
                raise ValueError("the prompt takes more positions than the context holds")
            parts = [part.upper() if isinstance(part, str) else part.load() for part in prompt]
            yield [Answer(parts=tuple(parts), tokens=(1, 2), logprob=-1.0, finish="stop")] * options.n

    def canvases(self, prompt, options, *, previews=0):
        text = prompt[-1]
        self.drawn.append((text, options))
        if text == "break":
            raise RuntimeError("the device is lost")
        if text not in tiny.COLOURS:
            raise ValueError(f"{text!r} is no colour that this model draws")
        start = np.full((SIZE, SIZE, 3), GREY, np.uint8)
        if isinstance(prompt[0], ImageInput):
            start = prompt[0].pixels(SIZE)
        mask = np.ones((SIZE, SIZE), bool)
        if options.mask is not None:
            height, width = options.mask.shape
            rows, columns = np.arange(SIZE) * height // SIZE, np.arange(SIZE) * width // SIZE
            mask = options.mask[rows[:, None], columns]
        for step in range(previews + 1):
            self.go.wait()
            pixels = start.copy()
            done = mask & (np.arange(SIZE) < SIZE * (step + 1) // (previews + 1))[:, None]
            pixels[done] = tiny.COLOURS[text]
            yield Canvas([Image.fromarray(pixels)] * options.n, "stop" if step == previews else None)
