"""Published language models and encoders: every parameter from where it belongs, and what does not fit."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.models.vision.clip_resnet import CLIP_RESNETS
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.published.encoder_sources import open_encoder
from magma_jax.published.keymap.engine import KeyMapError
from magma_jax.published.language_model_sources import open_lm, read_tokenizer
from magma_jax.storage.torch.writer import write_torch_file
from tests.data.vocabularies import pieces
from tests.published import published

VIT = CLIPViTConfig(layers=2, width=32, heads=2, patch=8, image_size=32, embedding_width=16)
NF = NFResNetConfig(blocks=(1, 2, 1, 1), stage_channels=(16, 16, 32, 32), stem_channels=8)


def read(opened):
    with opened as (plan, _):
        return {path: tensor.read() for path, tensor in plan.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, np.asarray(expected[path]).astype(array.dtype), path)


@pytest.fixture
def gptj(tmp_path):
    return tmp_path / "gptj", published.gptj_folder(tmp_path / "gptj")


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """GPT-2's vocabulary does not fit in tiny tables."""
    monkeypatch.setattr("magma_jax.published.language_model_sources.gpt2_tokenizer", lambda: train_bpe([], 258))


def test_gptj_in_another_dtype(gptj):
    folder, expected = gptj
    found = read(open_lm(folder, dataclasses.replace(published.GPTJ, dtype="bfloat16")))
    assert {array.dtype.name for array in found.values()} == {"bfloat16"}
    assert_same(found, expected)
    with open_lm(folder, published.GPTJ) as (_, files):
        assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_rows_are_cut_and_never_added(gptj):
    folder, expected = gptj
    found = read(open_lm(folder, dataclasses.replace(published.GPTJ, vocab_rows=301, head_rows=305)))
    cut = expected | {"wte/weight": expected["wte/weight"][:301]}
    cut |= {path: expected[path][:305] for path in ("lm_head/weight", "lm_head/bias")}
    assert_same(found, cut)
    for rows, message in (
        (311, r"has 310 rows where model.lm.vocab_rows asks for 311; set it"),
        (256, "cut off words; the vocabulary has 257"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(open_lm(folder, dataclasses.replace(published.GPTJ, vocab_rows=rows, head_rows=max(rows, 310))))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(published.GPTJ, heads=4, rotary_dim=2), "it has heads 2, not 4, rotary_dim 4, not 2"),
        (dataclasses.replace(published.GPTJ, layers=2), "it has layers 3, not 2"),
        (GPT2Config(layers=3, width=16, heads=2), "holds a gptj, but the config's language model is a gpt2"),
    ],
)
def test_another_language_model(gptj, config, message):
    with pytest.raises(ConfigError, match=message):
        read(open_lm(gptj[0], config))


def test_a_language_model_that_lacks_a_tensor(gptj):
    index = gptj[0] / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = values["weight_map"]["lm_head.bias"]
    values["weight_map"] = {key: file for key, file in values["weight_map"].items() if file != shard}
    index.write_text(json.dumps(values))
    with pytest.raises(KeyMapError, match=r"(?s)gptj: names.*lm_head/bias"):
        read(open_lm(gptj[0], published.GPTJ))


def test_a_vocabulary_of_its_own_must_be_there(tmp_path):
    config = GPTNeoXConfig()
    with pytest.raises(ConfigError, match=r"tokenizer.json: no vocabulary"):
        read_tokenizer(tmp_path, config)
    pieces().save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path, config).eos == "<eos>"
    with pytest.raises(
        ConfigError, match=r"has 263 words, but model\.lm\.vocab_rows is 262; it belongs to another model"
    ):
        read_tokenizer(tmp_path, dataclasses.replace(config, vocab_rows=262))
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 260]}')
    with pytest.raises(
        ConfigError, match=r"^'.*json' has the usual word 'b' at id 260, which is named as an end of text; it belongs"
    ):
        read_tokenizer(tmp_path, config)
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 999]}')  # one that the model has and the text lacks
    read_tokenizer(tmp_path, config)
    backend = pieces()
    backend.normalizer = tokenizers.normalizers.NFD()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: turns the text .* that change texts are not offered"):
        read_tokenizer(tmp_path, config)


@pytest.mark.parametrize("prefix", ["visual.", "", "module.visual."])
@pytest.mark.parametrize(
    "config", [published.RESNET, VIT, dataclasses.replace(VIT, output="grid")], ids=["rn", "vit", "grid"]
)
def test_clip_state_dicts(tmp_path, config, prefix):
    tensors, expected = published.clip_tensors(config, prefix.removeprefix("module."))
    if prefix.startswith("module."):
        tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
    if getattr(config, "output", "") == "grid":  # open_clip's files hold the projection all the same
        tensors[f"{prefix}proj"] = np.zeros((32, 16), np.float32)
    write_torch_file(tmp_path / "clip.pt", {"state_dict": tensors})
    assert_same(read(open_encoder(tmp_path / "clip.pt", config)), expected)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("half", [False, True])
def test_a_torchscript_archive_of_open_clips_resnet(tmp_path, half, modified_resnet):
    torch = pytest.importorskip("torch")
    config = published.RESNET
    torch.manual_seed(0)
    visual = modified_resnet(config.blocks, 16, 4, config.image_size, config.width).eval()
    model = torch.nn.Sequential()
    model.add_module("visual", visual)
    model.register_buffer("input_resolution", torch.tensor(64))
    trace = torch.jit.trace(model, torch.zeros(1, 3, 64, 64))
    (trace.half() if half else trace).save(tmp_path / "RN.pt")
    found = read(open_encoder(tmp_path / "RN.pt", config))
    expected = visual.state_dict()
    np.testing.assert_array_equal(
        found["layer2/rest/conv3/weight"][0], expected["layer2.1.conv3.weight"].float().numpy()
    )
    assert {array.dtype.name for array in found.values()} == {"float32", "int32"}


def test_nf_resnet_of_timm(tmp_path):
    tensors, expected = published.clip_tensors(NF, "")
    names = {"0.0.": "stem.", "0.1.": "stages."}
    tensors = {names[key[:4]] + key[4:]: tensor for key, tensor in tensors.items()}
    tensors |= {"head.fc.weight": np.zeros((10, 32), np.float32), "head.fc.bias": np.zeros(10, np.float32)}
    write_torch_file(tmp_path / "nf.pt", tensors)
    assert_same(read(open_encoder(tmp_path / "nf.pt", NF)), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CLIP_RESNETS["RN50"], r"of the config: it has blocks \(1, 2, 1, 1\), not \(3, 4, 6, 3\), width 8, not 64"),
        (VIT, "holds a clip_resnet, but the config's encoder is a clip_vit"),
    ],
)
def test_another_encoder(tmp_path, config, message):
    write_torch_file(tmp_path / "clip.pt", published.clip_tensors(published.RESNET)[0])
    with pytest.raises(ConfigError, match=message):
        read(open_encoder(tmp_path / "clip.pt", config))


def test_positions_of_another_image_size(tmp_path):
    """The class token's stays; ``models.test_encoders_of_today`` compares with PyTorch."""
    tensors, _ = published.clip_tensors(VIT)
    write_torch_file(tmp_path / "clip.pt", tensors)
    found = read(open_encoder(tmp_path / "clip.pt", dataclasses.replace(VIT, image_size=64)))["positional_embedding"]
    table = np.asarray(tensors["visual.positional_embedding"])
    assert (len(table), len(found)) == ((32 // VIT.patch) ** 2 + 1, (64 // VIT.patch) ** 2 + 1)
    np.testing.assert_array_equal(found[0], table[0])
    tensors["visual.positional_embedding"] = table[:-1]
    write_torch_file(tmp_path / "cut.pt", tensors)
    with pytest.raises(ConfigError, match=r"positional_embedding has .* rows, which are no square and 1 more"):
        read(open_encoder(tmp_path / "cut.pt", VIT))


def test_no_encoder_at_all(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match=r"no encoder that is known here, its tensors are 'weight'"):
        read(open_encoder(tmp_path / "x.pt", VIT))


@pytest.mark.parametrize("quick", [True, False])
def test_open_clips_settings_tell_the_activation(tmp_path, quick):
    tensors, expected = published.clip_tensors(VIT)
    write_torch_file(tmp_path / "open_clip_pytorch_model.bin", tensors)
    settings = {"model_cfg": {"embed_dim": 16, "vision_cfg": {}} | ({"quick_gelu": True} if quick else {})}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    right, wrong = ("quick_gelu", "gelu") if quick else ("gelu", "quick_gelu")
    file = tmp_path / "open_clip_pytorch_model.bin"
    assert_same(read(open_encoder(file, dataclasses.replace(VIT, activation=right))), expected)
    with pytest.raises(ConfigError, match=f"its model uses {right}; set model.encoder.activation"):
        read(open_encoder(file, dataclasses.replace(VIT, activation=wrong)))
