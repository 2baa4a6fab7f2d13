"""docs/names.md: from the names of a language model and an encoder on the hub to a server."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from PIL import Image

from magma_jax.config import load_config_file
from magma_jax.convert.__main__ import main
from magma_jax.families import run_config
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.vision.catalog import build_encoder
from magma_jax.models.vision.vit import SiglipConfig
from magma_jax.nn.modules import split
from magma_jax.published.hf.encoders import vit_table
from magma_jax.published.hf.write import to_hf_config
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.storage.safetensors_file import write_safetensors
from tests import tiny
from tests.models.language_tiny import LANGUAGE_MODELS
from tests.storage.hub_server import Hub, serve

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/names.md").read_text()
LM, ENCODER = (re.search(rf"^{name}=(.*)$", PAGE, re.M)[1] for name in ("LM", "ENCODER"))
CONFIG = ROOT / "configs/from_names.py"
SIGLIP = {
    "model_type": "siglip",
    "text_config": {"model_type": "siglip_text_model"},
    "vision_config": {
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40},
        **{"patch_size": 2, "image_size": 36},
    },
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Tiny models under the names of the page, in the files that the hub has of such models; and others."""
    folder = tmp_path_factory.mktemp("names")
    lm = vars(LANGUAGE_MODELS["qwen3"]) | {"vocab_rows": 300, "context_length": 192}
    lm = type(LANGUAGE_MODELS["qwen3"])(**{name: value for name, value in lm.items() if name != "kind"})
    params = split(Decoder(lm, rngs=nnx.Rngs(0)))[1]
    tensors = to_theirs(language_model_table(lm), {path: np.asarray(leaf) for path, leaf in params.items()})
    if lm.head == "tied":
        del tensors["lm_head.weight"]
    write_safetensors(folder / "lm.safetensors", tensors)
    encoder = SiglipConfig(layers=2, width=24, heads=2, feed_forward=40, patch=2, image_size=36)
    params = split(build_encoder(encoder, rngs=nnx.Rngs(1)))[1]
    tensors = to_theirs(vit_table(encoder), {path: np.asarray(leaf) for path, leaf in params.items()})
    tensors = {f"vision_model.{key}": tensor for key, tensor in tensors.items()}
    write_safetensors(folder / "encoder.safetensors", tensors)
    words = tiny.dataset().tokenizer
    words.save(folder / "words")
    config = to_hf_config(lm)
    settings = {
        "tokenizer.json": (folder / "words/tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps({"eos_token": words.eos, "chat_template": "{{ messages }}"}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [words.eos_id, 299]}).encode(),
    }
    files = {"config.json": config, "mamba": {"model_type": "mamba"}}
    files["yarn"] = config | {"rope_scaling": {"type": "yarn"}}
    files = {name: json.dumps(content).encode() for name, content in files.items()}
    weights = (folder / "lm.safetensors").read_bytes()
    return {
        LM: settings | {"config.json": files["config.json"], "model.safetensors": weights},
        ENCODER: {
            "config.json": json.dumps(SIGLIP).encode(),
            "model.safetensors": (folder / "encoder.safetensors").read_bytes(),
        },
        "me/mamba": {"config.json": files["mamba"], "model.safetensors": weights},
        "me/yarn": settings | {"config.json": files["yarn"], "model.safetensors": weights},
        "me/gguf": {"model.gguf": weights},
    }


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    with serve(Hub(repositories)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        close_session()
        yield hub
        close_session()


def test_sizes_are_read_from_the_names(hub):
    config = run_config(load_config_file(f"{CONFIG}:{LM}+{ENCODER}"))
    model = config.model
    assert (model.lm.kind, model.lm.layers, model.lm.dtype) == ("qwen3", 2, "bfloat16")
    assert (model.encoder.kind, model.encoder.positions) == ("siglip", 18 * 18)
    assert (model.prefix.shuffle, model.prefix.mapping, model.begin) == (2, "mlp", None)  # 9 x 9
    assert config.optim.groups["encoder"] == "frozen"
    assert not hub.downloads("model.safetensors")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (LM, "are not two names; write LANGUAGE_MODEL+ENCODER"),
        (f"{LM}+", "are not two names"),
        (
            f"me/absent+{ENCODER}",
            "hf://me/absent: the hub has no such repository; check the name, and if it is priv",
        ),
        (f"{LM}+me/absent", "hf://me/absent: the hub has no such repository"),
        (f"{LM}@absent+{ENCODER}", "the repository has no such revision"),
        (f"qwen+{ENCODER}", "not a hub address"),
        (f"me/gguf+{ENCODER}", "hf://me/gguf: the repository has no config.json, in which the model's sizes stand"),
        (f"me/mamba+{ENCODER}", "model_type 'mamba' is none of the language models here: gptj"),
        (f"me/yarn+{ENCODER}", "'yarn' is not offered"),
        (f"{ENCODER}+{LM}", "model_type 'siglip' is none of the language models here"),
        (f"{LM}+{LM}", "model_type 'qwen3' is none of the encoders here"),
    ],
)
def test_names_that_do_not_work(hub, names, says, capsys):
    lm, _, encoder = names.partition("+")
    command = ["compose", "--lm", f"hf://{lm}", "--encoder", f"hf://{encoder}", "--config", f"{CONFIG}:{names}"]
    assert main([*command, "models/mine"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("fetching ")]
    assert len(error) == 1
    assert says in error[0]
    assert not Path("models").exists()
    assert not hub.downloads("model.safetensors")


# ``magma-jax`` as the page calls it; what is trained is small.
COMMAND = """#!{python}
import sys
import time
from importlib.util import find_spec
from magma_jax.__main__ import main
if __name__ == "__main__":
    words = sys.argv[1:]
    if "--config" in words:
        words += [] if "--set" in words else ["--set"]
        words += ["model.lm.dtype=float32", "model.dtype=float32", "batch_size=4", "validation.every=2"]
        words += ["watch.samples_every=0", "log_every=1", "data.workers=0", "optim.warmup_steps=0"]
        words += ["steps=4" if "steps=2000" in words else "steps=2"]
    if words[0] == "plan" and find_spec("libtpu") is None:
        sys.exit(0)
    sys.exit(main(words))
"""


@pytest.mark.slow
def test_the_page_from_names_to_a_server(repositories, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/magma-jax").write_text(COMMAND.format(python=sys.executable))
    (tmp_path / "bin/magma-jax").chmod(0o755)
    work = tmp_path / "work"
    (work / "photos").mkdir(parents=True)
    with open(work / "my.jsonl", "w") as table:
        for number in range(60):
            name, colour = list(tiny.COLOURS.items())[number % 4]
            pixels = np.full((64, 64, 3), colour, np.uint8)
            pixels[: number // 4 + 1] = 0  # no two are alike
            Image.fromarray(pixels).save(work / f"photos/{number:03}.png")
            row = {"image": f"{number:03}.png", "caption": f"a {name} square", "question": "What?", "answer": name}
            print(json.dumps(row), file=table)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    _, variables, *blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    said = ""
    with serve(Hub(repositories)) as hub:
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "XLA_FLAGS": ""}
        environment = {**os.environ, **settings, "PATH": path, "PYTHONPATH": str(ROOT)}
        for number, text in enumerate(blocks):
            if number == 1:
                hub.requests.clear()  # of composing
            command, begun = variables + text.replace("8000", port), time.monotonic()
            done = subprocess.run(
                ["bash", "-ec", command], cwd=work, env=environment, capture_output=True, text=True, check=False
            )
            print(f"{time.monotonic() - begun:.0f} seconds: {text.splitlines()[0]}", flush=True)
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            assert "Warning" not in done.stderr, done.stderr
            said += done.stdout + done.stderr
        # A composed model is not asked for again.
        assert not hub.requests
    assert "base=models/mine" in said
    assert "model.lm.kind=qwen3" in said
    assert '"finish_reason"' in said
    ends = json.loads((work / "model/tokenizer/generation_config.json").read_text())["eos_token_id"]
    assert ends[1:] == [299]
    if find_spec("libtpu") is not None:
        assert "MFU" in said
