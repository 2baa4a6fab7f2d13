"""Command line, Python, server and page give the same greedy text."""

import pytest

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.data.images import ImageInput
from magma_jax.generate.__main__ import main as generate
from magma_jax.output import printable
from magma_jax.storage.model_folder import write_model_folder
from tests.serve.browser import Page
from tests.serve.running import square, user

PROMPT = "A picture of"


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    metadata = {"model": to_dict(model.config)}
    write_model_folder(folder, metadata, model.params, lambda path: model.tokenizer.save(path / "tokenizer"))
    return str(folder)


@pytest.fixture(scope="module")
def said(folder):
    model = Magma.from_checkpoint(folder)
    prompt = [ImageInput(square("white").resize((128, 96))), PROMPT]
    return model.generate(model.preprocess_inputs(prompt), 12, temperature=0.0)[0]


def test_command_line_and_server(folder, said, server, tmp_path, capsys):
    image = square("white").resize((128, 96))
    image.save(tmp_path / "white.png")
    arguments = ["--checkpoint", folder, str(tmp_path / "white.png"), PROMPT, "--max-new-tokens", "12", "--stream"]
    assert generate(arguments) == 0
    assert capsys.readouterr().out.split() == printable(said).split()
    response = server.chat(messages=user(image, PROMPT), max_tokens=12)
    assert response.json()["choices"][0]["message"]["content"] == said


def test_page(said, server, browser, tmp_path):
    browser.get(server.url)
    page = Page(browser, tmp_path)
    browser.execute_script("document.getElementById('max_tokens').value = 12")
    page.upload("white")
    page.ask()
    assert page.text(".answer") == said
