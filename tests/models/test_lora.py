"""LoRA: PEFT's results and files, what learns, merging and removing, beside adapters and on quantized matrices."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.convert.__main__ import main
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.families.magma.config import roles
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.magma import SHARDINGS, MagmaModel
from magma_jax.nn.adapters import AdapterConfig, is_adapter
from magma_jax.nn.lora import LoraConfig
from magma_jax.nn.modules import AdapterParam, LanguageParam, abstract, merge, parameter_count, split
from magma_jax.published.hf.peft import PeftError, lora_table, read_lora, write_lora
from magma_jax.runtime.sharding import MeshConfig, make_mesh, parameter_shardings
from magma_jax.storage.model_folder import write_model_folder
from magma_jax.training.run import setup
from tests import tiny
from tests.models import lora_tiny
from tests.models.language_tiny import LANGUAGE_MODELS
from tests.training.test_language_models import LANGUAGE_MODELS as OLDER

PEFT = Path(__file__).parents[1] / "fixtures/peft"
TOLERANCE = 2e-5


def logits(config, params, lora=None):
    definition = abstract(lambda: Decoder(config, lora=lora, rngs=nnx.Rngs(0)))[0]

    @jax.jit
    def run(params, ids):
        model = merge(definition, params)
        return model.logits(model(model.embed(ids)).hidden)

    return np.asarray(run(params, lora_tiny.IDS))


def test_pefts_files_and_results(tmp_path):
    """Of peft 0.21.2's own writer, see ``fixtures/make_peft_golden.py``; written again bit for bit."""
    config, expected = lora_tiny.CONFIG, np.load(PEFT / "logits.npz")["logits"]
    lora, params = read_lora(PEFT, config)
    assert lora == LoraConfig(3, 5.0, ("q_proj", "v_proj", "c_proj"), 0.1)
    found = logits(config, lora_tiny.base() | params, lora)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(found - logits(config, lora_tiny.base())).max() > 0.1 * np.abs(expected).max()
    write_lora(tmp_path, config, lora, params)
    again, same = read_lora(tmp_path, config)
    assert again == lora
    assert same.keys() == params.keys()
    assert all(same[path].tobytes() == params[path].tobytes() for path in params)
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (PEFT, tmp_path))
    theirs["target_modules"].sort()
    assert {key: theirs[key] for key in ours} == ours


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what other libraries warn about
def test_peft_reads_ours(tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.test_language_models_of_today import parameters, pytorch_model

    for name in ("llama", "phi3", "opt"):
        config, folder = LANGUAGE_MODELS[name], tmp_path / name
        params = parameters(name, folder)
        lora = LoraConfig(4, 6.0, config.trunk().block.matrices, rank_stabilized=True)
        shapes = abstract(lambda config=config, lora=lora: Decoder(config, lora=lora, rngs=nnx.Rngs(0)))[1]
        random = np.random.default_rng(2)
        own = {path: random.normal(size=s.shape).astype("f4") * 0.2 for path, s in shapes.items() if is_adapter(path)}
        (folder / "lora").mkdir()
        write_lora(folder / "lora", config, lora, own)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        adapted = peft.PeftModel.from_pretrained(base, folder / "lora").eval()
        with torch.no_grad():
            expected = adapted(torch.from_numpy(lora_tiny.IDS)).logits.numpy()
        found = logits(config, {**params, **own}, lora)
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), name
        assert pytorch_model(name) is not None


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *OLDER])
def test_what_learns_is_a_type(name):
    """Every matrix of every model: its LoRA is of the adapters' type, everything else of the language model's."""
    config = (LANGUAGE_MODELS | OLDER)[name]
    block = config.trunk().block
    lora = LoraConfig(rank=3, targets=block.matrices)
    plain = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1]
    _, shapes, types = abstract(lambda: Decoder(config, lora=lora, rngs=nnx.Rngs(0)))
    assert {path for path in shapes if not is_adapter(path)} == set(plain)
    assert {types[path] for path in plain} == {LanguageParam}
    added = {path: shape for path, shape in shapes.items() if is_adapter(path)}
    assert {types[path] for path in added} == {AdapterParam}
    names = {path.partition("/lora/")[0] for path in added}
    matrices = [plain[f"{name}/weight"].shape for name in names]
    assert len(matrices) == len(block.matrices)
    assert parameter_count(added) == sum(config.layers * 3 * (out + inputs) for _, out, inputs in matrices)
    # Every one has a name in PEFT's files, and a place on a mesh.
    assert {rule.ours for rule in lora_table(config, lora)} == set(added)


@functools.cache
def magma_parts():
    lora = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "out_proj", "c_fc"), dropout=0.5)
    config = dataclasses.replace(tiny.MODEL, lora=lora, attn_adapter=None, mlp_adapter=AdapterConfig("parallel", 8))
    definition, shapes, _ = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    params = {
        path: (random.normal(size=shape.shape) * 0.3 + ("ln" in path)).astype(shape.dtype)
        for path, shape in shapes.items()
    }
    return config, definition, params


@functools.cache
def folder_logits(definition):
    @jax.jit
    def run(params, key):
        model = merge(definition, params)
        features, tokens = jnp.ones((2, 4, 32)), jnp.arange(12).reshape(2, 6)
        return model.logits(model.caption_hidden(features, tokens, dropout_key=key))

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, _, params = magma_parts()
    made = tmp_path_factory.mktemp("lora") / "model"
    words = tiny.dataset().tokenizer
    write_model_folder(made, {"model": to_dict(config)}, params, lambda out: words.save(out / "tokenizer"))
    return made


def test_merging_and_removing(folder, tmp_path):
    """Beside bottleneck adapters, which stay."""
    config, definition, params = magma_parts()
    expected = np.asarray(folder_logits(definition)(params, None))
    plain = dataclasses.replace(config, lora=None)
    without = abstract(lambda: MagmaModel(plain, rngs=nnx.Rngs(0)))[0]
    found = {}
    for command in ("merge-lora", "remove-lora"):
        assert main([command, str(folder), str(tmp_path / command)]) == 0
        model = open_model_folder(tmp_path / command)
        assert model.config == plain
        read = {path: tensor.read() for path, tensor in model.params.items()}
        found[command] = np.asarray(folder_logits(without)(read, None))
        for path, leaf in read.items():
            merged = command == "merge-lora" and path.endswith(("q_proj/weight", "attn/out_proj/weight", "c_fc/weight"))
            merged = merged and path.startswith("lm/")
            assert (leaf.tobytes() == params[path].tobytes()) != merged, path
    assert np.abs(found["merge-lora"] - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(found["remove-lora"] - expected).max() > 0.01 * np.abs(expected).max()
    model = merge(definition, params)
    model.lm.remove_adapters()
    assert not any(map(is_adapter, split(model)[1]))


def test_dropout_of_a_lora_needs_a_key():
    _, definition, params = magma_parts()
    run = folder_logits(definition)
    plain, first, second = (np.asarray(run(params, key)) for key in (None, jax.random.key(0), jax.random.key(1)))
    assert not np.array_equal(first, plain)
    assert not np.array_equal(first, second)
    assert roles(magma_parts()[0]).keys() >= {"adapter"}


def test_out_to_peft_and_in_again(folder, tmp_path, capsys):
    assert main(["to-peft", str(folder), str(tmp_path / "adapter")]) == 0
    assert main(["remove-lora", str(folder), str(tmp_path / "base")]) == 0
    assert main(["from-peft", *(str(tmp_path / name) for name in ("base", "adapter", "again"))]) == 0
    assert "LoRA of rank 2 at q_proj, out_proj, c_fc" in capsys.readouterr().out
    model = open_model_folder(tmp_path / "again")
    config, _, params = magma_parts()
    assert model.config == config
    assert all(model.params[path].read().tobytes() == params[path].tobytes() for path in params)
    # Bad input: one line each.
    for arguments, says in {
        ("merge-lora", "base", "x"): "has no LoRA (model.lora is not set)",
        ("from-peft", "again", "adapter", "x"): "has a LoRA already; merge or remove it first",
        ("from-peft", "base", "base", "x"): "holds no LoRA in PEFT's layout (adapter_config.json cannot be read)",
        ("to-peft", "again", "base"): "already exists",
    }.items():
        assert main([arguments[0], *(str(tmp_path / name) for name in arguments[1:])]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert main(["from-peft", str(tmp_path / "base"), str(PEFT), str(tmp_path / "x")]) == 2
    assert "is a LoRA of another model" in capsys.readouterr().err
    assert main(["quantize", str(folder), str(tmp_path / "int8")]) == 0
    assert main(["merge-lora", str(tmp_path / "int8"), str(tmp_path / "x")]) == 2
    assert "matrices are in int8, to which nothing can be added exactly" in capsys.readouterr().err


@pytest.mark.slow
def test_on_quantized_matrices(folder, tmp_path):
    assert main(["quantize", str(folder), str(tmp_path / "int8")]) == 0
    quantized, params = open_model_folder(tmp_path / "int8"), magma_parts()[2]
    assert {quantized.params[path].dtype.name for path in params if is_adapter(path)} == {"float32"}
    read = {path: tensor.read() for path, tensor in quantized.params.items()}
    definition = abstract(lambda: MagmaModel(quantized.config, rngs=nnx.Rngs(0)))[0]
    found, exact = folder_logits(definition)(read, None), folder_logits(magma_parts()[1])(params, None)
    assert np.abs(found - exact).max() <= 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "describes 'IA3', and only LORA is offered"),
        ({"use_dora": True}, "use_dora True of its adapter_config.json is not offered here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* is not offered here"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern .* is not offered here"),
        ({"unheard_of": 1}, "unheard_of 1 of its adapter_config.json is not offered here"),
        ({"bias": "all"}, "bias 'all' of its adapter_config.json is not offered here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
        ({"r": 4}, "is a LoRA of another model: .*"),
        ({"r": "3"}, "r '3' of its adapter_config.json is no number"),
    ],
)
def test_loras_that_are_refused(changes, says, tmp_path):
    made = tmp_path / "adapter"
    shutil.copytree(PEFT, made)
    values = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(values | changes))
    with pytest.raises(PeftError, match=says) as caught:
        read_lora(made, lora_tiny.CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["opt", "qwen3", "gemma2"])
def test_a_lora_of_another_model(name):
    with pytest.raises(PeftError, match="is a LoRA of another model: ") as caught:
        read_lora(PEFT, LANGUAGE_MODELS[name])
    assert "\n" not in str(caught.value)


def test_configs_that_do_not_fit():
    with pytest.raises(ValueError, match="lora: the blocks of this model have no c_gate, but q_proj, k_proj"):
        abstract(lambda: Decoder(tiny.MODEL.lm, lora=LoraConfig(targets=("c_gate",)), rngs=nnx.Rngs(0)))
    for wrong in ({"targets": ()}, {"rank": 0}, {"dropout": 1.0}, {"targets": ("q_proj", "q_proj")}):
        with pytest.raises(ValueError, match=r"rank must be|lora: "):
            LoraConfig(**wrong)


def test_shards_on_meshes():
    _, _, params = magma_parts()
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=2), jax.devices()[:4])
    found = parameter_shardings(params, mesh, SHARDINGS)
    for part, spec in {
        "q_proj/lora/down": (None, None, "fsdp"),
        "q_proj/lora/up": (None, "model"),
        "out_proj/lora/down": (None, None, "model"),
        "out_proj/lora/up": (None, "fsdp"),
    }.items():
        assert tuple(found[f"lm/layers/attn/{part}/weight"].spec) == spec, part


@pytest.mark.slow
def test_a_run_trains_the_lora_alone(tmp_path, monkeypatch):
    """No leaf of the language model changes; run, result and continuation hold the LoRA."""
    data = tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)
    lora = LoraConfig(rank=2, targets=("q_proj", "c_proj"), dropout=0.1)
    model = dataclasses.replace(tiny.MODEL, lora=lora, mlp_adapter=None)
    run = tiny.train(tiny.run_config(model=model, steps=3, checkpoint_every=2), tmp_path / "run")
    assert all(path.startswith("lm/") and not is_adapter(path) for path in run.frozen)
    own = [path for path in run.state.trainable if "/lora/" in path]
    assert len(own) == 4
    fresh = split(MagmaModel(model, rngs=nnx.Rngs(0)))[1]
    magma = Magma.from_checkpoint(tmp_path / "run")
    assert magma.config == model
    for path in own:
        assert np.abs(np.asarray(magma.params[path])).max() > 0
        np.testing.assert_array_equal(magma.params[path], run.state.trainable[path])
    assert {path for path in fresh if path.startswith("lm/") and not is_adapter(path)} == set(run.frozen)
    bare = magma.remove_adapters()
    assert bare.config.lora is None
    assert isinstance(magma.generate(magma.preprocess_inputs(["A picture of"]), max_steps=4)[0], str)
