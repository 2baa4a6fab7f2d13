"""CLIP with both towers equals transformers' from the same weights; its tokenizer; files that are refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.clip_text import clip_text_ids
from magma_jax.published.text.clip import read_clip
from magma_jax.storage.byte_file import WeightFileError

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "fixtures" / "clip_tiny.npz"

LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
REST = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "logit_scale": "logit_scale",
}


def openai_names(state):
    """The tensors of transformers' CLIPModel under OpenAI's names."""
    found = {}
    for key, tensor in state.items():
        tower, _, rest = key.partition("_model.encoder.layers.")
        if rest:
            number, _, name = rest.partition(".")
            root = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}."
            stem, _, part = name.rpartition(".")
            if stem in LAYER:
                found[f"{root}{LAYER[stem]}.{part}"] = tensor
            elif stem == "self_attn.q_proj":
                parts = [state[key.replace("q_proj", f"{one}_proj")] for one in "qkv"]
                found[f"{root}attn.in_proj_{part}"] = np.concatenate(parts)
        elif key in REST:
            found[REST[key]] = tensor
        elif key.rpartition(".")[0] in REST:
            found[f"{REST[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}"] = tensor
    found["text_projection"] = state["text_projection.weight"].T.copy()
    found["visual.proj"] = state["visual_projection.weight"].T.copy()
    return found


def their_model(torch, transformers):
    """A tiny CLIPModel whose weights come from NumPy, so that they are the same in every release of PyTorch."""
    sizes = {"num_hidden_layers": 2, "intermediate_size": 256, "hidden_act": "quick_gelu", "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 49408, "hidden_size": 64, "max_position_embeddings": 12, "eos_token_id": 49407}
        | sizes,
        vision_config={"hidden_size": 64, "image_size": 64, "patch_size": 32} | sizes,
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for key, value in weights().items():
            model.get_parameter(key).copy_(torch.from_numpy(value))
    return model


def weights():
    """Its tensors under transformers' names."""
    rng = np.random.default_rng(0)
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 64),
        "text_model.embeddings.position_embedding.weight": (12, 64),
        "vision_model.embeddings.class_embedding": (64,),
        "vision_model.embeddings.patch_embedding.weight": (64, 3, 32, 32),
        "vision_model.embeddings.position_embedding.weight": (5, 64),
        "text_projection.weight": (24, 64),
        "visual_projection.weight": (24, 64),
    }
    for name in ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"):
        shapes |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    layers = {"mlp.fc1": (256, 64), "mlp.fc2": (64, 256), "layer_norm1": (64,), "layer_norm2": (64,)}
    layers |= {f"self_attn.{one}_proj": (64, 64) for one in ("q", "k", "v", "out")}
    for tower, number in itertools.product(("text", "vision"), range(2)):
        for name, shape in layers.items():
            root = f"{tower}_model.encoder.layers.{number}.{name}"
            shapes |= {f"{root}.weight": shape, f"{root}.bias": shape[:1]}
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    tensors = openai_names(weights() | {"logit_scale": np.array(1.0, np.float32)})
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return path


TEXTS = ["a red car", "A photo of a cat, isn't it?", "one two three four five six seven eight nine ten eleven"]


def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_both_towers_equal_transformers(file):
    """The stored vectors are transformers', see the next test."""
    model = read_clip(file)
    assert (model.width, model.image_size) == (24, 64)
    assert model.name.startswith("clip_vit-quick_gelu-")
    with np.load(GOLDEN) as expected:
        np.testing.assert_allclose(model.texts(TEXTS), expected["texts"], atol=2e-5)
        np.testing.assert_allclose(model.images(pixels()), expected["images"], atol=2e-5)
    assert clip_text_ids(TEXTS, 12)[1].tolist()[2] == 11  # cut, and ended
    assert model.texts([]).shape == (0, 24)
    scores = model.scores([Image.fromarray(one) for one in pixels()], TEXTS[0])
    np.testing.assert_allclose(scores, model.images(pixels()) @ model.texts(TEXTS[:1])[0], atol=1e-6)


@pytest.mark.slow
def test_stored_vectors_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids, _ = clip_text_ids(TEXTS, 12)
    mean, std = (np.array(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    images = torch.from_numpy(((pixels() / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        given = their_model(torch, transformers)(input_ids=torch.from_numpy(ids.astype(np.int64)), pixel_values=images)
    with np.load(GOLDEN) as expected:
        np.testing.assert_allclose(expected["texts"], given.text_embeds.numpy(), atol=1e-5)
        np.testing.assert_allclose(expected["images"], given.image_embeds.numpy(), atol=1e-5)


def test_settings_beside_the_weights_tell_the_activation(file, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(file.read_bytes())
    settings = {"model_cfg": {"embed_dim": 24, "text_cfg": {"heads": 1}, "vision_cfg": {"head_width": 64}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    assert read_clip(tmp_path / "weights.safetensors").name.startswith("clip_vit-gelu-")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the settings of an open_clip model"):
        read_clip(tmp_path / "weights.safetensors")


def test_files_that_are_no_clip(file, tmp_path):
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "visual." in key}, tmp_path / "images.safetensors")
    with pytest.raises(ConfigError, match=r"no CLIP with a text tower .*token_embedding\.weight is missing"):
        read_clip(tmp_path / "images.safetensors")
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightFileError):
        read_clip(tmp_path / "none.safetensors")


def test_ids_are_those_of_clip():
    ids, ends = clip_text_ids(["a photo of a cat", "It&amp;s   1984!? naïve 🙂"], 20)
    assert ids[0, : ends[0] + 1].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[0, ends[0] + 1 :].tolist() == [0] * (19 - ends[0])
    assert ids[1, : ends[1] + 1].tolist() == [
        *(49406, 585, 261, 338, 272, 280, 279, 275, 6004, 1097, 35689, 563, 14860, 49407)
    ]
