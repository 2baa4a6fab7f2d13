"""CM3Leon in OPT's and metaseq's layouts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.convert.golden import inputs_of
from magma_jax.convert.layouts.layout import (
    Layout,
    absent_folder,
    in_order,
    read_source,
    write_checkpoint,
    write_folder,
)
from magma_jax.convert.magma_checkpoint import absent
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.families.cm3leon.loading import open_folder, read_cm3leon
from magma_jax.models.cm3leon import CM3LeonModel
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.cm3leon_keys import cm3leon_table
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.open_cm3leon import join, open_torch_cm3leon
from magma_jax.storage.model_folder import CheckpointError


def from_torch(
    checkpoint: str | Path,
    out: str | Path,
    model_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Converts a file to a model folder, in the file's dtypes, see ``open_torch_cm3leon``.

    Raises:
        CheckpointError: ``out`` already exists, the tokenizer has more tokens than the vocabulary, or the disk is too
        small. Also the errors of ``open_torch_cm3leon``.
    """
    absent_folder(out)
    words = tokenizer or gpt2_tokenizer()
    with open_torch_cm3leon(checkpoint, model_config) as model:
        config = model.config
        if words.vocab_size > config.vocabulary.text:
            raise CheckpointError(
                f"{checkpoint}: has {config.vocabulary.text} text tokens, but the tokenizer (GPT-2's unless "
                f"--tokenizer names another) has {words.vocab_size}"
            )
        write_folder(
            checkpoint,
            out,
            config,
            model.params,
            model.files,
            model.source,
            lambda folder: words.save(folder / "tokenizer"),
        )
    return f"{config.layers} layers of width {config.width}, {config.activation}, vocabulary {config.vocab_rows}"


def published(folder: str | Path) -> dict[str, Any]:
    """A folder's tensors under the keys of its source, in its order; OPT's for a model that was trained here.

    The image tokenizer has a layout of its own and is left out.
    """
    config, params = open_folder(folder)
    for name in ("references", "grid_positions"):
        if getattr(config, name):
            raise CheckpointError(
                f"{folder}: its model.{name} are additions of this library, which no published layout has; only a "
                "model without them is converted"
            )
    source = read_source(folder)
    decoder = {path: tensor for path, tensor in params.items() if not path.startswith("image_tokenizer/")}
    module = to_theirs(cm3leon_table(source.get("layout", "opt")), decoder)
    return in_order(join(module) if source.get("joint") else module, source["keys"])


def to_torch(folder: str | Path, checkpoint: str | Path) -> None:
    """Writes a model folder or a run as a PyTorch file.

    Raises:
        FileExistsError: ``checkpoint`` already exists. CheckpointError: not such a folder, or a model with
            additions of this library.
    """
    absent(checkpoint)
    module, counters = published(folder), read_source(folder)["counters"]
    if not counters:
        config = open_folder(folder)[0]
        counters = {"config": {"heads": config.heads, "activation": config.activation}}
    write_checkpoint(checkpoint, module, counters)


def quantities(
    checkpoint: Path, arrays: Mapping[str, np.ndarray], model_config: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    """Of ``tokens``: embeddings, states after the first layer and the last norm, logits and log-probabilities."""
    config, params = read_cm3leon(checkpoint, "float32", model_config, any_vocabulary=True)
    definition = abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))[0]
    tokens = inputs_of(arrays, "tokens", (None, None), "iu").astype(np.int32)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_rows:
        raise ValueError(f"tokens: has ids {tokens.min()} to {tokens.max()}, the model embeds {config.vocab_rows}")

    @jax.jit
    def forward(params: Any, tokens: Any) -> dict[str, Any]:
        model = merge(definition, params)
        output = model(model.embed(tokens), collect=("out",))
        logits = model.logits(output.hidden)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        hidden = {"first": output.inputs, "mid": output.collected["out"][0], "last": output.hidden}
        return {f"hidden_{name}": array for name, array in hidden.items()} | {
            "logits": logits,
            "next_token_logprob": logprobs,
        }

    yield from forward(params, jnp.asarray(tokens)).items()


CM3LEON = Layout(
    from_torch=from_torch,
    to_torch=to_torch,
    params=lambda folder: open_folder(folder)[1],
    published=published,
    golden_inputs=frozenset({"tokens"}),
    quantities=quantities,
)
