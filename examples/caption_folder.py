"""Writes a caption for every image of a folder.

    python examples/caption_folder.py runs/quickstart my_images captions.json

The checkpoint is a run folder of train.py, a converted model folder, a .pt file, or hf://OWNER/NAME.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from magma_jax import ImageInput, Magma
from magma_jax.data.images import ImageError

PROMPT = "A picture of"
BATCH = 8  # images per batch


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and captions the images."""
    parser = argparse.ArgumentParser(description="Writes a caption for every image of a folder.")
    parser.add_argument("checkpoint")
    parser.add_argument("images", type=Path, help="folder")
    parser.add_argument("output", type=Path, help="JSON file: name of an image to its caption")
    arguments = parser.parse_args(argv)

    images = {}
    for file in sorted(arguments.images.iterdir()):
        try:
            images[file.name] = ImageInput(ImageInput(file).load())  # decoded once, here
        except (ImageError, IsADirectoryError) as error:
            print(f"left out: {error}")
    if not images:
        parser.error(f"{arguments.images}: no images in it")

    model = Magma.from_checkpoint(arguments.checkpoint)
    captions = {}
    names = list(images)
    for first in range(0, len(names), BATCH):
        batch = names[first : first + BATCH]
        prompts = model.preprocess_batch([[images[name], PROMPT] for name in batch])
        texts = model.generate(prompts, max_steps=20, temperature=0.0)  # greedy: the same caption every time
        captions |= {name: PROMPT + text for name, text in zip(batch, texts, strict=True)}
    arguments.output.write_text(json.dumps(captions, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {len(captions)} captions")


if __name__ == "__main__":
    main()
