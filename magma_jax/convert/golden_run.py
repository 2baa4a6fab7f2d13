"""Computes the quantities of a golden file with a model of this library.

Each function yields ``(name, array)`` pairs in PyTorch's layout. Names:

    enc_out, prefix_proj_out, prefix, input_embeddings, labels, hidden_states, logits, loss
    blockI/{ln_1,attn_inner,attn,mlp_inner,mlp,}_out, past_key_I, past_value_I    layer I
    grad_eval/KEY, grad_norms_eval        gradients of the trainable parameters (grad_names names the norms)
    train/{loss,prefix}, grad_train/KEY, grad_norms_train, bn_after_1_train_forward/KEY
                                          the same with BatchNorm's batch statistics and without dropout
    opt/{losses,grad_norms_before_clip,eval_loss_after}, opt/param/KEY, opt/bn/KEY, opt/param_delta_norms
                                          three AdamW steps on the batches 0, 1, 0
    gen1, gen2, genb, gent, geneos        greedy generation, see ``generations``
    fp16/*, bf16/*                        the forward pass in half precision
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from magma_jax.convert.golden import GoldenError, inputs_of
from magma_jax.families.magma.config import roles
from magma_jax.families.magma.loss import caption_labels, caption_loss
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.nn.modules import EncoderParam, abstract, merge, spared_by_decay, split, variable_types
from magma_jax.published.keymap import engine as keymap
from magma_jax.published.magma_keys import magma_table
from magma_jax.training.step.optim import Group, OptimConfig, label_parameters, make_optimizer, partition, with_groups
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.terms import LOSS, Terms
from magma_jax.training.step.train_step import Batch, init_state, make_train_step
from magma_jax.typing import IGNORED, Params

Quantities = Iterator[tuple[str, Any]]

# GPT-2's; the .json beside a golden file may override it.
EOS_TOKEN = 50256
BLOCK_FIELDS = {
    "ln_1_out": "ln_1",
    "attn_inner_out": "attn_inner",
    "attn_out": "attn",
    "mlp_inner_out": "mlp_inner",
    "mlp_out": "mlp",
    "out": "out",
}


@dataclasses.dataclass
class Subject:
    """Model in fp32 and the inputs of a golden file, checked against each other."""

    config: MagmaConfig
    params: Params
    golden: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]

    def __post_init__(self):
        size, lm = self.config.encoder.image_size, self.config.lm
        self.images = _images(inputs_of(self.golden, "images", (None, 3, size, size), "f"))
        self.captions = inputs_of(self.golden, "captions", (len(self.images), None), "iu").astype(np.int32)
        for name in ("captions", "text_a", "text_b", "opt/captions_1"):
            if name in self.golden and not 0 <= self.golden[name].min() <= self.golden[name].max() < lm.vocab_rows:
                raise GoldenError(f"golden input {name!r} has token ids outside the model's {lm.vocab_rows} rows")
        self.eos_id = int(self.settings.get("eos_token", EOS_TOKEN))
        model = nnx.eval_shape(lambda: MagmaModel(self.config, rngs=nnx.Rngs(0)))
        self.graphdef, self.spared = split(model)[0], spared_by_decay(model)
        self.labels = label_parameters(variable_types(model), roles(self.config))
        self.positions = merge(self.graphdef, self.params).image_positions
        if self.captions.shape[1] <= self.positions:
            raise GoldenError(f"golden input 'captions' must be longer than an image's {self.positions} positions")

    def batch(self, images: np.ndarray, captions: np.ndarray) -> dict[str, jax.Array]:
        """Batch for the loss; as in the original, prefix plus text are as long as ``captions``."""
        tokens = jnp.asarray(captions[:, : captions.shape[1] - self.positions])
        return {"images": jnp.asarray(images), "tokens": tokens, "labels": caption_labels(tokens, self.eos_id)}

    def names(self, pattern: str) -> list[re.Match]:
        """Matches of the golden names."""
        return [match for name in self.golden if (match := re.fullmatch(pattern, name))]

    def theirs(self, params: Params) -> dict[str, np.ndarray]:
        """Renames parameters, gradients or statistics of any part of the model to PyTorch keys."""
        planned = keymap.to_theirs(magma_table(self.config), params)
        return {key: tensor.read() for key, tensor in planned.items()}


def forward(subject: Subject) -> Quantities:
    """Forward pass, loss and gradients with frozen statistics."""
    # Only the quantities in the file: at full size a layer's activations take gigabytes, and so do gradients.
    asked = {match[2] for match in subject.names(r"block(\d+)/(\w+)") if match[2] in BLOCK_FIELDS}
    asked = {BLOCK_FIELDS[name] for name in asked} | {match[1] for match in subject.names(r"past_(key|value)_\d+")}
    collect = tuple(sorted(asked | ({"out"} if "hidden_states" in subject.golden else set())))
    batch = subject.batch(subject.images, subject.captions)
    if subject.names(r"grad_eval/.*|grad_norms_eval"):
        trainable, frozen, statistics = partition(subject.params, subject.labels)
        result, loss, grads = _evaluate(subject.graphdef, trainable, frozen | statistics, batch, collect)
        yield from _gradients(subject, grads, "eval")
    else:
        result, loss = _forward(subject.graphdef, subject.params, batch, collect)
    collected = result.pop("collected")
    yield from result.items()
    yield "loss", loss
    yield "labels", np.pad(batch["labels"], ((0, 0), (subject.positions, 0)), constant_values=IGNORED)
    for match in subject.names(r"block(\d+)/(\w+)"):
        if match[2] in BLOCK_FIELDS and int(match[1]) < subject.config.lm.layers:
            yield match[0], collected[BLOCK_FIELDS[match[2]]][int(match[1])]
    for match in subject.names(r"past_(key|value)_(\d+)"):
        if int(match[2]) < subject.config.lm.layers:
            yield match[0], collected[match[1]][int(match[2])].transpose(0, 2, 1, 3)


def half_precision(subject: Subject) -> Quantities:
    """Forward pass in fp16 and bf16, as far as the golden file has it."""
    for name, dtype in (("fp16", jnp.float16), ("bf16", jnp.bfloat16)):
        if not subject.names(f"{name}/.*"):
            continue
        config = dataclasses.replace(subject.config, dtype=jnp.dtype(dtype).name)
        graphdef, _, _ = abstract(lambda config=config: MagmaModel(config, rngs=nnx.Rngs(0)))
        params = cast(subject.params, dtype)
        batch = subject.batch(subject.images, subject.captions)
        result, loss = _forward(graphdef, params, batch, ("out",))
        yield f"{name}/loss", loss
        yield f"{name}/prefix", result["prefix"]
        yield f"{name}/hidden_last", result["hidden_states"][-1]
        yield f"{name}/logits_last8", result["logits"][:, -8:]


def training(subject: Subject) -> Quantities:
    """Train-mode forward pass and gradients, and optimizer steps if there is a second batch."""
    if not subject.names(r"train/.*|grad_train/.*|grad_norms_train|bn_after_1_train_forward/.*|opt/.*"):
        return
    yield "train/prefix", _train_prefix(subject.graphdef, subject.params, subject.images)
    trainable, frozen, statistics = partition(subject.params, subject.labels)
    optimizer = optax.chain(_keep_gradients(), make_optimizer(_optimizer(subject), subject.labels, subject.spared))
    step = jax.jit(make_train_step(subject.graphdef, _train_loss, optimizer))
    batches = [subject.batch(subject.images, subject.captions)]
    has_steps = "opt/images_1" in subject.golden
    if has_steps:
        images = inputs_of(subject.golden, "opt/images_1", subject.golden["images"].shape, "f")
        captions = inputs_of(subject.golden, "opt/captions_1", subject.captions.shape, "iu").astype(np.int32)
        batches += [subject.batch(_images(images), captions), batches[0]]

    state, history = init_state(trainable, statistics, optimizer), []
    for i, batch in enumerate(batches):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        history.append(metrics)
        if i == 0:
            yield "train/loss", metrics["loss"]
            yield from _gradients(subject, state.opt_state[0], "train")
            for key, value in subject.theirs(state.statistics).items():
                yield f"bn_after_1_train_forward/{key}", value
    if not has_steps:
        return
    yield "opt/losses", np.array([metrics["loss"] for metrics in history])
    yield "opt/grad_norms_before_clip", np.array([metrics["grad_norm"] for metrics in history])
    after, before = subject.theirs(state.trainable), subject.theirs(trainable)
    for key, value in after.items():
        yield f"opt/param/{key}", value
    for key, value in subject.theirs(state.statistics).items():
        yield f"opt/bn/{key}", value
    if "opt/param_names" in subject.golden:
        moved = {key: np.linalg.norm((after[key] - before[key]).astype(np.float64)) for key in after}
        yield "opt/param_delta_norms", _by_name(subject, "opt/param_names", moved)
    if "opt/eval_loss_after" in subject.golden:
        params = state.trainable | frozen | state.statistics
        yield "opt/eval_loss_after", _loss(subject.graphdef, params, batches[0])


def cast(params: Params, dtype: Any) -> Params:
    """Casts the floating parameters to ``dtype``."""
    return {
        path: jnp.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None)
        for path, leaf in params.items()
    }


def _images(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.astype(np.float32).transpose(0, 2, 3, 1))


def _gradients(subject: Subject, grads: Params, mode: str) -> Quantities:
    theirs = subject.theirs(grads)
    for key, value in theirs.items():
        yield f"grad_{mode}/{key}", value
    if f"grad_norms_{mode}" in subject.golden:
        norms = {key: np.linalg.norm(value.astype(np.float64)) for key, value in theirs.items()}
        yield f"grad_norms_{mode}", _by_name(subject, "grad_names", norms)


def _by_name(subject: Subject, names: str, values: Mapping[str, Any]) -> np.ndarray:
    """Values in the order of an array of names; NaN, which never compares equal, for unknown names."""
    wanted = inputs_of(subject.golden, names, (None,), "U")
    return np.array([values.get(str(name), np.nan) for name in wanted])


def _optimizer(subject: Subject) -> OptimConfig:
    rates = {"encoder": 2e-4, "rest": 2e-3}
    decay = 0.0
    for group in subject.settings.get("opt_groups", ()):
        role = "encoder" if group["params"][0].startswith("image_prefix.enc.") else "rest"
        rates[role] = float(group["lr"])
        decay = max(decay, float(group["weight_decay"]))
    config = OptimConfig(
        learning_rate=rates["rest"],
        schedule="constant",
        b2=0.95,
        weight_decay=decay,
        clip_norm=1.0,
        groups={EncoderParam.role: Group(learning_rate=rates["encoder"])},
    )
    return with_groups(config, roles(subject.config))


def _keep_gradients() -> optax.GradientTransformation:
    """Identity transformation that stores the gradients as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )


def _train_loss(model: MagmaModel, batch: Batch, key: Any) -> Terms:
    """Loss with the original's train-mode BatchNorm; the golden runs disable dropout."""
    del key
    return caption_loss(model, batch, None, options=LossOptions(batch_norm="batch"))


def _run(model: MagmaModel, batch: Mapping[str, Any], collect: tuple[str, ...]) -> dict[str, Any]:
    """Intermediate results of the forward pass over prefix and tokens."""
    features = model.encode_images(batch["images"])
    prefix = model.embed_features(features)
    embeddings = jnp.concatenate([prefix, model.embed_tokens(batch["tokens"])], axis=1)
    output = model(embeddings, collect=collect)
    result = {
        "enc_out": features,
        "prefix_proj_out": model.image_prefix.project(features),
        "prefix": prefix,
        "input_embeddings": embeddings,
        "logits": model.logits(output.hidden),
        "collected": output.collected,
    }
    if "out" in collect:
        inner = output.collected["out"][:-1]
        result["hidden_states"] = jnp.concatenate([embeddings[None], inner, output.hidden[None]])
    return result


def _mean_loss(model: MagmaModel, batch: Batch) -> Any:
    return caption_loss(model, batch, None, options=LossOptions())[LOSS].mean


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _loss(graphdef, params, batch):
    return _mean_loss(merge(graphdef, params), batch)


@functools.partial(jax.jit, static_argnames=("graphdef", "collect"))
def _forward(graphdef, params, batch, collect):
    model = merge(graphdef, params)
    return _run(model, batch, collect), _mean_loss(model, batch)


@functools.partial(jax.jit, static_argnames=("graphdef", "collect"))
def _evaluate(graphdef, trainable, rest, batch, collect):
    loss, grads = jax.value_and_grad(lambda params: _mean_loss(merge(graphdef, params, rest), batch))(trainable)
    return _run(merge(graphdef, trainable, rest), batch, collect), loss, grads


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _train_prefix(graphdef, params, images):
    model = merge(graphdef, params)
    return model.embed_features(model.encode_images(images, batch_norm="batch"))
