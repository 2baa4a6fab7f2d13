"""Losses, discriminator and codebook care of VQ-GAN training against PyTorch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.models.vision import codebook, vqgan_losses
from magma_jax.models.vision.patchgan import PatchGAN, PatchGANConfig
from magma_jax.nn.convolution import conv2d
from magma_jax.nn.modules import DiscriminatorParam, Statistic, abstract, merge, parameter_count, roles_of, split

SMALL = PatchGANConfig(width=8, layers=2)


def images(seed, side=24):
    return np.random.default_rng(seed).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)


def test_reconstruction_losses():
    x, y = images(0), images(1)
    loss = vqgan_losses.reconstruction_loss(jnp.asarray(x), jnp.asarray(y), l1=2.0, l2=3.0)
    np.testing.assert_allclose(loss, 2 * np.abs(x - y).mean() + 3 * np.square(x - y).mean(), rtol=1e-5)
    plain = vqgan_losses.reconstruction_loss(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(plain, np.abs(x - y).mean(), rtol=1e-5)


def test_adversarial_losses_equal_pytorchs():
    torch = pytest.importorskip("torch")
    real, fake = np.random.default_rng(0).normal(0, 2, (2, 2, 5, 5)).astype(np.float32)

    def theirs(real, fake):
        return 0.5 * (torch.relu(1.0 - real).mean() + torch.relu(1.0 + fake).mean())

    loss, gradients = jax.value_and_grad(vqgan_losses.discriminator_loss, argnums=(0, 1))(real, fake)
    scores = [torch.tensor(array, requires_grad=True) for array in (real, fake)]
    expected = theirs(*scores)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    for found, score in zip(gradients, scores, strict=True):
        np.testing.assert_allclose(found, score.grad.numpy(), atol=1e-8)
    np.testing.assert_allclose(vqgan_losses.generator_loss(jnp.asarray(fake)), -fake.mean(), rtol=1e-5)


def torch_patchgan(torch, config, params):
    """The same layers in PyTorch, with these parameters."""
    widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
    layers, names = [torch.nn.Conv2d(3, widths[0], 4, 2, 1), torch.nn.LeakyReLU(0.2)], {"0": "conv_in"}
    for i in range(1, config.layers + 1):
        names |= {str(len(layers)): f"conv{i}", str(len(layers) + 1): f"bn{i}"}
        stride = 2 if i < config.layers else 1
        layers.append(torch.nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False))
        layers += [torch.nn.BatchNorm2d(widths[i]), torch.nn.LeakyReLU(0.2)]
    names[str(len(layers))] = "conv_out"
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(widths[-1], 1, 4, 1, 1))
    state = {
        key: torch.tensor(np.asarray(params[f"{names[number]}/{name}"]))
        for key in model.state_dict()
        for number, name in [key.split(".")]
    }
    model.load_state_dict(state)
    assert len(state) == len(params)
    return model, {path: key for key in state for path in [f"{names[key.split('.')[0]]}/{key.split('.')[1]}"]}


@pytest.mark.parametrize("layers", [1, 2])
def test_the_discriminator_equals_pytorchs(layers):
    torch = pytest.importorskip("torch")
    config = PatchGANConfig(width=8, layers=layers)
    definition, params = split(PatchGAN(config, rngs=nnx.Rngs(0)))
    theirs, keys = torch_patchgan(torch, config, params)
    x = images(0)

    @jax.jit
    def run(params, x):
        model = merge(definition, params)
        trained = model(x, "batch")
        after = split(model)[1]
        return trained, after, merge(definition, after)(x, "frozen")

    trained, after, frozen = run(params, jnp.asarray(x))
    nchw = torch.tensor(x.transpose(0, 3, 1, 2).copy())
    np.testing.assert_allclose(trained, theirs(nchw).detach().numpy()[:, 0], atol=1e-5)
    state = theirs.state_dict()
    for path, array in after.items():
        np.testing.assert_allclose(array, state[keys[path]].numpy(), atol=1e-6, err_msg=path)
    np.testing.assert_allclose(frozen, theirs.eval()(nchw).detach().numpy()[:, 0], atol=1e-5)


def test_the_published_discriminator():
    _, shapes, types = abstract(lambda: PatchGAN(PatchGANConfig(), rngs=nnx.Rngs(0)))
    learns = {path: leaf for path, leaf in shapes.items() if types[path] is not Statistic}
    assert {types[path] for path in learns} == {DiscriminatorParam}
    assert roles_of(DiscriminatorParam) == {"discriminator"}
    # Convolutions 3,136 + 131,072 + 524,288 + 2,097,152 + 8,193, norms 2 x (128 + 256 + 512).
    assert parameter_count(learns) == 2_765_633


def test_images_without_a_score_are_refused():
    model = PatchGAN(SMALL, rngs=nnx.Rngs(0))
    assert SMALL.smallest == 12
    assert model(jnp.zeros((1, 12, 13, 3)), "frozen").shape == (1, 1, 1)
    with pytest.raises(
        ValueError, match="images of 12 x 11 pixels: a discriminator of 2 layers needs sides of at least 12"
    ):
        model(jnp.zeros((1, 12, 11, 3)), "frozen")


def test_the_adaptive_weight_equals_pytorchs():
    torch = pytest.importorskip("torch")
    definition, params = split(PatchGAN(SMALL, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 24, 24, 4)).astype(np.float32)
    weight, target = rng.normal(0, 0.1, (3, 4, 3, 3)).astype(np.float32), images(1)

    def reconstruction(x):
        return vqgan_losses.reconstruction_loss(x, jnp.asarray(target))

    def adversarial(x):
        return vqgan_losses.generator_loss(merge(definition, params)(x, "batch"))

    def found(weight):
        return vqgan_losses.adaptive_weight(
            lambda weight: conv2d(jnp.asarray(features), weight, 1, 1), weight, reconstruction, adversarial
        )

    value, gradient = jax.jit(jax.value_and_grad(found))(jnp.asarray(weight))
    discriminator, _ = torch_patchgan(torch, SMALL, params)
    last = torch.tensor(weight, requires_grad=True)
    x = torch.nn.functional.conv2d(torch.tensor(features.transpose(0, 3, 1, 2).copy()), last, padding=1)
    losses = (x - torch.tensor(target.transpose(0, 3, 1, 2).copy())).abs().mean(), -discriminator(x).mean()
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses]
    expected = torch.clamp(norms[0] / (norms[1] + 1e-4), 0.0, 1e4).item()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert (gradient == 0).all()


def test_the_adaptive_weight_is_limited():
    def found(scale):
        return vqgan_losses.adaptive_weight(lambda w: w, jnp.ones((3, 1, 1, 1)), jnp.sum, lambda x: scale * x.sum())

    np.testing.assert_allclose(found(0.5), 3**0.5 / (0.5 * 3**0.5 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(found(0.0), 1e4)
    far = vqgan_losses.adaptive_weight(
        lambda w: w, jnp.ones((1, 1, 1, 1)), lambda x: 9 * x.sum(), lambda x: 0 * x.sum()
    )
    np.testing.assert_allclose(far, 1e4)


def test_the_adversarial_loss_starts_late():
    assert [float(vqgan_losses.adversarial_factor(step, 10)) for step in (0, 9)] == [0, 0]
    np.testing.assert_allclose([vqgan_losses.adversarial_factor(step, 10) for step in (10, 11)], 0.8)


def test_psnr():
    x = np.zeros((2, 4, 4, 3), np.float32)
    y = np.stack([x[0] + 0.2, x[1] + 3])
    found = vqgan_losses.psnr(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, [10 * np.log10(4 / 0.04), 10 * np.log10(4)], rtol=1e-5)
    assert np.isinf(vqgan_losses.psnr(jnp.asarray(x), jnp.asarray(x))).all()


def test_kmeans_equals_numpys():
    """From the same vectors, Lloyd's algorithm gives the same means; codes keep vectors in these clusters."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 10, (6, 3))
    vectors = (centres[rng.integers(0, 6, 300)] + rng.normal(0, 0.1, (300, 3))).astype(np.float32)
    key = jax.random.key(1)
    start = np.asarray(codebook.kmeans(key, jnp.asarray(vectors), 6, iterations=0))
    assert all((vectors == row).all(1).any() for row in start)
    assert len(np.unique(start, axis=0)) == 6
    means = start.astype(np.float64)
    for _ in range(4):
        nearest = np.square(vectors[:, None] - means).sum(-1).argmin(1)
        means = np.stack([vectors[nearest == i].mean(0) for i in range(6)])
    found = codebook.kmeans(key, jnp.asarray(vectors), 6, iterations=4)
    np.testing.assert_allclose(found, means, atol=1e-4)


def test_kmeans_leaves_no_code_without_vectors():
    """Nine of ten vectors are equal: a start from distinct rows has equal codes, which only moving repairs."""
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(np.concatenate([np.zeros((270, 2)), rng.normal(0, 5, (30, 2))]).astype(np.float32))

    def used(iterations):
        book = codebook.kmeans(jax.random.key(0), vectors, 16, iterations=iterations)
        return float(codebook.share_used(codebook.code_counts(codebook.nearest_codes(vectors, book), 16)))

    assert used(0) < 0.3
    assert used(40) > 0.8
    with pytest.raises(ValueError, match="a codebook of 301 codes needs at least as many vectors, got 300"):
        codebook.kmeans(jax.random.key(0), vectors, 301)


def test_unused_codes_restart_from_latents():
    rng = np.random.default_rng(0)
    book = rng.normal(size=(8, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 2, 2, 3)).astype(np.float32)
    usage = np.array([0.0, 5, 5, 0.1, 5, 5, 0, 5], np.float32)
    run = jax.jit(codebook.restart_unused, static_argnames="threshold")
    errors = np.ones(latents.shape[:-1], np.float32)
    found = run(jax.random.key(0), book, usage, latents, errors, threshold=0.05)
    unused = usage < 0.05 * usage.mean()
    assert int(found.replaced) == unused.sum() == 3
    np.testing.assert_array_equal(np.asarray(found.codebook)[~unused], book[~unused])
    moved = np.asarray(found.codebook)[unused]
    assert all((latents.reshape(-1, 3) == row).all(1).any() for row in moved)
    assert len(np.unique(moved, axis=0)) == 3
    np.testing.assert_allclose(found.usage, np.where(unused, usage.mean(), usage), rtol=1e-6)

    # Fewer latents than codes to replace, and a threshold that replaces none.
    few = run(jax.random.key(0), book, usage, latents[:1, :1, :2], errors[:1, :1, :2], threshold=0.05)
    assert int(few.replaced) == 3
    assert int(run(jax.random.key(0), book, usage, latents, errors, threshold=0.0).replaced) == 0

    # Latents that equal their codes are not chosen while there are others.
    errors[0] = 0
    found = run(jax.random.key(1), book, usage, latents, errors, threshold=0.05)
    moved = np.asarray(found.codebook)[unused]
    assert all((latents[1].reshape(-1, 3) == row).all(1).any() for row in moved)


def test_usage():
    codes = jnp.asarray([[0, 0], [1, 3]])
    counts = codebook.code_counts(codes, 4)
    np.testing.assert_array_equal(counts, [2, 1, 0, 1])
    np.testing.assert_allclose(codebook.update_usage(jnp.full(4, 1.0), codes, 0.9), [1.1, 1.0, 0.9, 1.0], rtol=1e-6)
    assert float(codebook.share_used(counts)) == 0.75
    shares = np.array([2, 1, 1]) / 4
    np.testing.assert_allclose(codebook.perplexity(counts), np.exp(-(shares * np.log(shares)).sum()), rtol=1e-6)
    np.testing.assert_allclose(codebook.perplexity(jnp.ones(4)), 4, rtol=1e-6)
    np.testing.assert_allclose(codebook.perplexity(jnp.asarray([0.0, 7.0])), 1, rtol=1e-6)
