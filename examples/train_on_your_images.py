"""Finetunes a trained model on your own images and captions, and prints its caption of the first image.

    python examples/train_on_your_images.py my_images runs/mine

The folder holds images, each with its captions in a .txt file of the same name, one per line. Prefix and adapters are
trained; language model and encoder stay frozen. The run starts from runs/quickstart by default, which `python train.py`
creates. Started again, an interrupted run resumes where it stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from magma_jax import ImageInput, Magma
from magma_jax.data.readers import read
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.families import family_of, run_config
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, converts the images, trains and tries the result."""
    parser = argparse.ArgumentParser(description="Teaches a trained model your own images and captions.")
    parser.add_argument("images", type=Path, help="folder of images and .txt files")
    parser.add_argument("workdir", type=Path, help="run folder to write")
    parser.add_argument("--base", default="runs/quickstart", help="model to start from; default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    arguments = parser.parse_args(argv)

    # Training reads dataset folders: images and texts in a few large files.
    dataset = arguments.workdir.with_name(arguments.workdir.name + "_data")
    if not dataset.exists():
        convert(read("folder", arguments.images), dataset, ConvertOptions(workers=0))

    config = run_config(
        {
            "model": read_model_json(arguments.base)["model"],
            "base": arguments.base,
            "data": {
                "kind": "folders",
                "folders": {"train": [{"path": str(dataset), "caption_prompt": "A picture of"}]},
                "length": 32,
                "overlong": "truncate",
                "workers": 0,  # a small dataset needs no other processes
            },
            "optim": {
                "learning_rate": 1e-3,
                "clip_norm": 1.0,
                "groups": {"encoder": "frozen"},  # as the language model is anyway
            },
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
        }
    )
    train(family_of(config.model), config, arguments.workdir)

    model = Magma.from_checkpoint(arguments.workdir)
    captioned = (file for file in sorted(arguments.images.iterdir()) if file.with_suffix(".txt").exists())
    image = next(file for file in captioned if file.suffix != ".txt")
    prompt = model.preprocess_inputs([ImageInput(image), "A picture of"])
    print(f"{image}: A picture of{model.generate(prompt, max_steps=20, temperature=0.0)[0]}")


if __name__ == "__main__":
    main()
