"""CLIP's scores: equal to open_clip's with random weights; tokens; files that hold no CLIP."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.data.images import normalize, to_uint8
from magma_jax.data.tokenizers.clip_text import clip_tokens
from magma_jax.inference.clip_scores import ClipScorer
from magma_jax.models.clip import CLIP, CLIPConfig, CLIPTextConfig
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.keymap.engine import KeyMapError, to_theirs
from magma_jax.published.text.open_clip import clip_table, open_clip
from tests.published.published import noise, write_safetensors

TEXTS = ["a Red car!!", "it's 2023's café — naïve &amp;amp; 日本語", "I'LL  have\n12345 dogs' toys...", "a " * 100, ""]
VIT = CLIPViTConfig(layers=2, width=64, heads=1, patch=16, image_size=32, embedding_width=48)
TEXT = CLIPTextConfig(layers=2, width=64, heads=1, rows=100)


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)) for _ in TEXTS]


def write(path, config):
    """A CLIP of random weights as open_clip's file."""
    params = noise(abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))[1])
    tensors = {key: np.asarray(tensor.read()) for key, tensor in to_theirs(clip_table(config), params).items()}
    write_safetensors(path, tensors | {"logit_scale": np.array(4.6, np.float32)})
    return tensors


@pytest.mark.parametrize("quick", [True, False])
def test_equal_to_open_clip(quick, tmp_path, open_clip_module):
    torch = pytest.importorskip("torch")
    theirs = open_clip_module("transformer")
    options = {"width": 64, "layers": 2, "heads": 1, "output_dim": 48}
    options["act_layer"] = theirs.QuickGELU if quick else torch.nn.GELU
    image = theirs.VisionTransformer(image_size=32, patch_size=16, mlp_ratio=4.0, **options).eval()
    text = theirs.TextTransformer(vocab_size=49408, **options).eval()
    tensors = {f"visual.{name}": array.numpy() for name, array in image.state_dict().items()}
    tensors |= {name: array.numpy() for name, array in text.state_dict().items()}
    write_safetensors(tmp_path / "open_clip_model.safetensors", tensors)
    if not quick:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    scorer = ClipScorer(tmp_path / "open_clip_model.safetensors")
    assert scorer.name == "clip_vit 32 px, open_clip_model.safetensors"
    images = pictures()
    found = scorer(images, TEXTS)
    pixels = normalize(np.stack([to_uint8(picture, 32) for picture in images])).transpose(0, 3, 1, 2)
    with torch.no_grad():
        tokens = open_clip_module("tokenizer").SimpleTokenizer()(TEXTS)
        embedded = [part / part.norm(dim=-1, keepdim=True) for part in (image(torch.tensor(pixels)), text(tokens))]
    np.testing.assert_array_equal(clip_tokens(TEXTS, 77), tokens.numpy())
    np.testing.assert_allclose(found, (embedded[0] * embedded[1]).sum(-1).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "image",
    [VIT, CLIPResNetConfig((1, 2, 1, 1), 8, 64, embedding_width=48, attention_pool=True)],
    ids=["vit", "resnet"],
)
def test_the_config_follows_from_the_tensors(image, tmp_path):
    config = CLIPConfig(image, TEXT)
    tensors = write(tmp_path / "clip.safetensors", config)
    with open_clip(tmp_path / "clip.safetensors") as (found, plan):
        assert found == config
        np.testing.assert_array_equal(plan["text/proj"].read(), tensors["text_projection"])


def test_refused_files(tmp_path):
    path = tmp_path / "clip.safetensors"
    tensors = write(path, CLIPConfig(VIT, TEXT))
    alone = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    write_safetensors(path, alone)
    with pytest.raises(
        ConfigError, match=r"no CLIP that is known here, its tensors are .*positional_embedding is missing"
    ):
        ClipScorer(path)
    write_safetensors(path, {name: tensor for name, tensor in tensors.items() if name != "ln_final.bias"})
    with pytest.raises(KeyMapError, match=r"(?s)clip\.safetensors: .*ln_final"):
        ClipScorer(path)
    with pytest.raises(ValueError, match="its image encoder must pool"):
        CLIPConfig(CLIPResNetConfig())
    write(path, CLIPConfig(VIT, TEXT))
    with pytest.raises(ValueError, match="5 images, but 1 texts"):
        ClipScorer(path)(pictures(), ["a"])
