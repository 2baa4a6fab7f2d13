"""The VQ-GAN equals the original's on tiny weights, in both directions of conversion, and trains straight through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.models.vision.quantizer import codebook_loss, nearest_codes, straight_through
from magma_jax.models.vision.vqgan import PIXEL_MEAN, PIXEL_STD, VQGAN, VQGANS, VQGANConfig, to_pixels
from magma_jax.nn.convolution import GroupNorm
from magma_jax.nn.modules import TokenizerParam, abstract, merge, parameter_count, roles_of, spared_by_decay, split
from magma_jax.published.infer_config import InferenceError
from magma_jax.published.keymap.engine import KeyMapError, check_table, to_ours, to_theirs
from magma_jax.published.vqgan_keys import MAGVLT_PREFIX, TRAINING, infer_vqgan_config, open_vqgan, vqgan_table
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.storage.torch.writer import write_torch_file

TINY = VQGANConfig(
    image_size=16,
    width=32,
    multipliers=(2, 1),
    blocks=1,
    attention_sizes=(8,),
    latent_channels=8,
    code_width=12,
    codes=40,
)
# Another implementation in JAX matched these data within 3e-5.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tensors(golden_checkpoint):
    with open_torch_file(golden_checkpoint("magvlt/vqgan_tiny")) as file:
        return {key: tensor.read() for key, tensor in state_dict(file.tree)[0].items()}


@pytest.fixture(scope="module")
def model(golden_checkpoint):
    definition, _, _ = abstract(lambda: VQGAN(TINY, rngs=nnx.Rngs(0)))
    with open_vqgan(golden_checkpoint("magvlt/vqgan_tiny"), TINY) as (plan, _):
        return definition, {path: jnp.asarray(tensor.read()) for path, tensor in plan.items()}


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def test_every_stage_equals_the_originals(model, golden):
    definition, params = model
    with np.load(golden / "magvlt/vqgan_tiny.npz") as file:
        expected = dict(file)

    @jax.jit
    def run(params, images, codes):
        vqgan = merge(definition, params)
        result = vqgan(images)
        return {
            "enc0": vqgan.encoder(images),
            "z0": result.latents,
            "quant0": result.quantized,
            "recon0": result.images,
            "decode_code0": vqgan.decode(codes),
        }, (vqgan.encode(images), result.codes)

    computed, codes = run(params, nhwc(expected["x0"]), jnp.asarray(expected["rand_ids0"]))
    for name, array in computed.items():
        np.testing.assert_allclose(array, nhwc(expected[name]), rtol=0, atol=TOLERANCE, err_msg=name)
    for found in codes:
        np.testing.assert_array_equal(found, expected["ids0"])


@pytest.mark.parametrize("theirs", ["", MAGVLT_PREFIX], ids=["taming", "magvlt"])
def test_conversion_and_back_is_bit_exact(tensors, theirs):
    weights = {theirs + key: tensor for key, tensor in tensors.items() if not key.startswith("loss.")}
    table = vqgan_table(theirs, "image_tokenizer/")
    check_table(table)
    shapes = abstract(lambda: VQGAN(TINY, rngs=nnx.Rngs(0)))[1]
    target = {f"image_tokenizer/{path}": leaf for path, leaf in shapes.items()}
    ours = {path: tensor.read() for path, tensor in to_ours(table, weights, target).items()}
    assert ours.keys() == target.keys()
    back = {key: tensor.read() for key, tensor in to_theirs(table, ours).items()}
    assert back.keys() == weights.keys()
    for key, array in back.items():
        assert array.dtype == weights[key].dtype
        assert array.shape == weights[key].shape
        assert array.tobytes() == weights[key].tobytes(), key


def test_a_tokenizer_is_read_out_of_a_magvlt_checkpoint(tensors, model, tmp_path):
    whole = {MAGVLT_PREFIX + key: tensor for key, tensor in tensors.items() if not key.startswith("loss.")}
    path = tmp_path / "whole.ckpt"
    write_torch_file(path, {"state_dict": whole | {"model.tok_emb.weight": np.zeros((3, 2), np.float32)}})
    with open_vqgan(path, TINY) as (plan, files):
        assert files == (path,)
        for name, array in model[1].items():
            np.testing.assert_array_equal(plan[name].read(), array)


def test_unknown_and_missing_keys_are_refused(tensors):
    shapes = abstract(lambda: VQGAN(TINY, rngs=nnx.Rngs(0)))[1]
    with pytest.raises(KeyMapError, match=r"keys that no rule knows[\s\S]*loss\.discriminator"):
        to_ours(vqgan_table(), tensors, shapes)
    table = [*vqgan_table(), TRAINING]
    with pytest.raises(KeyMapError, match=r"encoder\.extra\.weight"):
        to_ours(table, tensors | {"encoder.extra.weight": np.zeros(2)}, shapes)
    fewer = {key: tensor for key, tensor in tensors.items() if key != "decoder.up.1.upsample.conv.bias"}
    with pytest.raises(KeyMapError, match="upsample1/bias"):
        to_ours(table, fewer, shapes)


def test_sizes_are_read_from_the_tensors(tensors, golden_checkpoint):
    assert infer_vqgan_config(tensors, 16) == TINY
    with (
        pytest.raises(ConfigError, match=r"holds VQGANConfig\(.*codes=40.*asks for .*codes=64"),
        open_vqgan(golden_checkpoint("magvlt/vqgan_tiny"), dataclasses.replace(TINY, codes=64)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"the tensor encoder\.conv_in\.weight is missing"),
        open_vqgan(golden_checkpoint("enc_clip_vit"), TINY),
    ):
        pass
    for key, wrong in [
        ("encoder.conv_in.weight", np.zeros((48, 3, 3, 3), np.float32)),
        ("encoder.conv_in.weight", np.zeros((0, 3, 3, 3), np.float32)),
        ("quantize.embedding.weight", np.zeros((0, 12), np.float32)),
        ("quantize.embedding.weight", np.zeros(12, np.float32)),
    ]:
        with pytest.raises(InferenceError):
            infer_vqgan_config(tensors | {key: wrong}, 16)


@pytest.mark.parametrize(
    ("name", "count", "tokens"), [("vqgan_f16_16384", 76_073_859, 256), ("vqgan_f8_8192", 66_890_627, 1024)]
)
def test_published_sizes(name, count, tokens):
    config = VQGANS[name]
    _, shapes, types = abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
    assert parameter_count(shapes) == count
    assert config.tokens == tokens
    assert set(types.values()) == {TokenizerParam}
    assert roles_of(TokenizerParam) == {"tokenizer"}
    inferred = infer_vqgan_config(to_theirs(vqgan_table(), shapes))
    assert inferred == config


def test_sides_need_not_be_the_nominal_ones(model):
    definition, params = model
    images = jax.random.uniform(jax.random.key(0), (1, 12, 20, 3), minval=-1)
    codes = jax.jit(lambda params: merge(definition, params).encode(images))(params)
    assert codes.shape == (1, 6, 10)
    vqgan = merge(definition, params)
    assert jax.eval_shape(vqgan.decode, codes).shape == images.shape
    with pytest.raises(ValueError, match=r"images of 12 x 21 pixels: both sides must be multiples of 2"):
        jax.eval_shape(vqgan.encode, jax.ShapeDtypeStruct((1, 12, 21, 3), jnp.float32))


def test_gradients_pass_the_quantisation():
    """The reconstruction reaches encoder and decoder, not the codebook; the codebook loss reaches the codebook."""
    definition, params = split(VQGAN(TINY, rngs=nnx.Rngs(0)))
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3), minval=-1)

    def reconstruction(params):
        return jnp.abs(merge(definition, params)(images).images - images).mean()

    def codebook(params):
        result = merge(definition, params)(images)
        return codebook_loss(result.latents, result.quantized, "taming")

    by_image, by_codes = jax.jit(lambda params: (jax.grad(reconstruction)(params), jax.grad(codebook)(params)))(params)

    def moves(gradients, path):
        return bool(jnp.any(gradients[path] != 0))

    assert moves(by_image, "encoder/conv_in/weight")
    assert moves(by_image, "decoder/conv_out/weight")
    assert not moves(by_image, "codebook/weight")
    assert moves(by_codes, "codebook/weight")
    assert moves(by_codes, "encoder/conv_in/weight")
    assert not moves(by_codes, "decoder/conv_out/weight")


def test_only_matrices_decay():
    model = nnx.eval_shape(lambda: VQGAN(TINY, rngs=nnx.Rngs(0)))
    spared = spared_by_decay(model)
    for path, leaf in split(model)[1].items():
        assert (path in spared) == (leaf.ndim == 1), path


def test_nearest_code_and_straight_through():
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    distances = np.square(latents[..., None, :].astype(np.float64) - codebook).sum(-1)
    codes = nearest_codes(jnp.asarray(latents), jnp.asarray(codebook))
    np.testing.assert_array_equal(codes, distances.argmin(-1))
    twice = jnp.asarray(np.stack([codebook[3], codebook[3]]))
    assert int(nearest_codes(jnp.asarray(codebook[3]), twice)) == 0

    value, pull = jax.vjp(straight_through, jnp.asarray(latents), jnp.asarray(codebook)[codes])
    np.testing.assert_allclose(value, codebook[np.asarray(codes)], atol=1e-6)
    to_latents, to_codebook = pull(jnp.ones_like(value))
    assert (to_latents == 1).all()
    assert (to_codebook == 0).all()


@pytest.mark.parametrize(("kind", "commitment", "codebook"), [("taming", 1.0, 0.25), ("vqvae", 0.25, 1.0)])
def test_codebook_losses(kind, commitment, codebook):
    rng = np.random.default_rng(0)
    z, q = (rng.normal(size=(2, 4, 4, 3)).astype(np.float32) for _ in range(2))
    loss, (to_z, to_q) = jax.value_and_grad(codebook_loss, argnums=(0, 1))(jnp.asarray(z), jnp.asarray(q), kind)
    np.testing.assert_allclose(loss, 1.25 * np.square(z - q).mean(), rtol=1e-6)
    np.testing.assert_allclose(to_z, commitment * 2 * (z - q) / z.size, rtol=1e-5)
    np.testing.assert_allclose(to_q, codebook * 2 * (q - z) / z.size, rtol=1e-5)


def test_an_unknown_codebook_loss_is_refused():
    with pytest.raises(Exception, match="ema"):
        codebook_loss(jnp.zeros((1, 2)), jnp.zeros((1, 2)), "ema")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 40}, "width must be a multiple of 32"),
        ({"image_size": 17}, "multiple of 2, got 17"),
        ({"attention_sizes": (4,)}, r"attention_sizes \[4\] are no level's side; these are \[16, 8\]"),
        ({"multipliers": ()}, "at least one level"),
        ({"codes": 0}, "codes must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_pixels():
    images = jnp.asarray([-1.5, -1.0, 0.0, 0.999, 1.0, 2.0], jnp.float32).repeat(3).reshape(1, 6, 3)
    np.testing.assert_array_equal(to_pixels(images)[0, :, 0], [0, 0, 127, 254, 255, 255])
    assert (PIXEL_MEAN, PIXEL_STD) == ((0.5,) * 3, (0.5,) * 3)


def test_group_norm():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (2, 3, 4, 64)).astype(np.float32)
    norm = GroupNorm(64, param=TokenizerParam)
    norm.weight[...], norm.bias[...] = jnp.arange(64.0), jnp.arange(64.0) - 9
    grouped = x.astype(np.float64).reshape(2, 12, 32, 2)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * np.arange(64) + np.arange(64) - 9
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-4)
    with pytest.raises(ValueError, match="multiple of 32 channels, got 48"):
        GroupNorm(48, param=TokenizerParam)


def test_bfloat16_is_close_to_float32(model):
    definition, params = model
    images = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1)
    run = jax.jit(lambda params, images: merge(definition, params).latents(images))
    full, half = run(params, images), run(params, images.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert float(jnp.abs(half - full).max()) < 0.05 * float(jnp.abs(full).max())
