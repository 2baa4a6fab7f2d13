"""Every command: bad input is one line and status 2, an interruption 130, and --help needs no JAX."""

import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import magma_jax
from magma_jax import commands
from magma_jax.__main__ import COMMANDS
from magma_jax.__main__ import main as magma_jax_main
from magma_jax.inference.pending import EngineError
from tests.storage.gcs_server import bucket_server

ROOT = Path(__file__).parent.parent
BAD = "no\x1b[31m"

# Arguments with which each command meets something that it cannot use.
UNUSABLE = {
    "train": ["--config", f"{BAD}.py"],
    "eval": ["--workdir", BAD],
    "magma_jax.convert.__main__": ["to-torch", BAD, "out"],
    "magma_jax.data.__main__": ["show", BAD],
    "magma_jax.evaluation.__main__": ["score", "--protocol=coco", "--references=no", f"--predictions={BAD}"],
    "magma_jax.generate.__main__": ["--checkpoint", BAD, f"{BAD}.png"],
    "magma_jax.plan.__main__": ["--config", f"{BAD}.py", "--topology", "v5e:2x2"],
    "magma_jax.retrieval.__main__": ["search", BAD, "a text"],
    "magma_jax.serve.__main__": ["--checkpoint", "no", "--api-key-file", BAD],
}
MORE = [
    ("train", ["--set", "x"]),
    ("eval", ["--task", "vqav2", "--workdir", BAD]),
    ("eval", ["--perplexity", "text.txt", "--workdir", BAD]),
    ("eval", ["--compare", BAD, BAD]),
    ("magma_jax.convert.__main__", ["verify", BAD]),
    ("magma_jax.data.__main__", ["convert", "--from", "folder", BAD, "out"]),
    ("magma_jax.generate.__main__", ["--checkpoint", "no", "a text"]),
    ("magma_jax.generate.__main__", ["--checkpoint", "no", "a text", "--temperature", "-1"]),
    ("magma_jax.retrieval.__main__", ["build", "out", "--data", BAD]),
    ("magma_jax.serve.__main__", ["--checkpoint", "no", "--port", "0"]),
]


def call(capsys, command, arguments):
    """Status and standard error of a command in this process."""
    try:
        status = importlib.import_module(command).main(arguments)
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err


def name_of(command):
    return f"{command}.py" if "." not in command else command.removesuffix(".__main__")


def check_line(command, said):
    assert said.startswith(f"{name_of(command)}: ")
    assert said.count("\n") == 1
    assert said.strip().isprintable()


@pytest.mark.parametrize(("command", "arguments"), [*UNUSABLE.items(), *MORE])
def test_unusable_input_is_one_line_and_status_2(command, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    status, said = call(capsys, command, arguments)
    assert status == 2
    check_line(command, said)
    if command in UNUSABLE and arguments == UNUSABLE[command]:
        assert "no\\u001b[31m" in said


@pytest.mark.parametrize("command", UNUSABLE)
def test_an_unknown_option_is_one_line_and_status_2(command, capsys):
    status, said = call(capsys, command, [f"--{BAD}", *UNUSABLE[command]])
    assert status == 2
    assert re.search(r"no\\u001b\[31m|invalid choice", said)
    check_line(command, said)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--workdir", "az://bucket/run"]),
        ("train", ["--set", "base=az://bucket/run"]),
        ("train", ["--set", "data.folders=gs://bucket/run"]),
        ("eval", ["--workdir", "az://bucket/run"]),
        ("eval", ["--checkpoint", "az://bucket/run", "--task", "vqav2"]),
        ("eval", ["--checkpoint", "run", "--task", "vqav2", "--data", "vqav2=gs://bucket/run"]),
        ("magma_jax.convert.__main__", ["export", "run", "az://bucket/run"]),
        ("magma_jax.convert.__main__", ["add-checksums", "gs://bucket/run"]),
        ("magma_jax.convert.__main__", ["quantize", "az://bucket/run", "out"]),
        ("magma_jax.data.__main__", ["show", "gs://bucket/run"]),
        ("magma_jax.generate.__main__", ["--checkpoint", "az://bucket/run", "x.png"]),
        ("magma_jax.serve.__main__", ["--checkpoint", "az://bucket/run"]),
    ],
)
def test_an_address_in_storage_that_is_not_supported_there_is_no_folder(
    command, arguments, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    status, said = call(capsys, command, arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert re.search("(gs|az)://bucket/run: not a local path; mount it", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--workdir", "gs://another/run"]),
        ("eval", ["--workdir", "gs://another/run"]),
        ("eval", ["--checkpoint", "gs://another/run", "--task", "vqav2"]),
        ("eval", ["--compare", "gs://another/run", "run"]),
        ("magma_jax.convert.__main__", ["export", "gs://another/run", "out"]),
        ("magma_jax.convert.__main__", ["export", "run", "gs://another/run"]),
        ("magma_jax.convert.__main__", ["to-hf", "run", "gs://another/run"]),
        ("magma_jax.convert.__main__", ["put-on", "gs://another/run", "base", "out"]),
        ("magma_jax.convert.__main__", ["verify", "gs://another/run", "out"]),
        ("magma_jax.convert.__main__", ["compose", "--lm", "gs://another/run", "--config", "magma_v2", "out"]),
        ("magma_jax.generate.__main__", ["--checkpoint", "gs://another/run", "a text"]),
        ("magma_jax.serve.__main__", ["--checkpoint", "gs://another/run"]),
    ],
)
def test_a_bucket_that_does_not_exist_is_one_line(command, arguments, monkeypatch, tmp_path, capsys):
    pytest.importorskip("gcsfs")
    bucket_server().clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, said = call(capsys, command, arguments)
    assert status == 2
    assert said.endswith("gs://another/run: there is no bucket another; check the name, or create it\n")


def test_an_evaluation_reads_from_a_bucket_and_writes_to_it(monkeypatch, tmp_path):
    pytest.importorskip("gcsfs")
    bucket = bucket_server()
    bucket.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("run", "model"):
        bucket.objects[f"{name}/model.json"] = b"{}", 1

    def evaluate(arguments):
        read = Path(arguments.checkpoint or arguments.workdir)
        assert (read / "model.json").read_text() == "{}"
        (arguments.output or read).mkdir(exist_ok=True)
        ((arguments.output or read) / "results.json").write_text(read.name)

    monkeypatch.setattr("magma_jax.cli.evaluate._evaluate", evaluate)
    main = importlib.import_module("magma_jax.cli.evaluate").main
    assert main(["--workdir", "gs://bucket/run"]) == 0
    assert main(["--checkpoint", "gs://bucket/model", "--task", "vqav2", "--output", "gs://bucket/out"]) == 0
    found = {name: content for name, (content, _) in bucket.objects.items() if name.endswith("results.json")}
    assert found == {"run/results.json": b"run", "out/results.json": b"model"}


def test_no_command_is_left_out():
    modules = sorted(ROOT.glob("magma_jax/**/__main__.py"))
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in modules} | {"train", "eval"}
    assert named == UNUSABLE.keys() | {"magma_jax.__main__"}  # which holds the others, see below


def test_help_needs_no_jax():
    """Of all commands in one process; each line of the output is a command that imported it."""
    code = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    assert shown.getvalue().startswith("usage: "), name
    if "jax" in sys.modules:
        sys.exit(name)
"""
    done = subprocess.run([sys.executable, "-c", code, *UNUSABLE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (ValueError("a\n b"), "x: a b\n", 2),
        (FileNotFoundError(2, "No such file", "file"), "x: file: No such file\n", 2),
        (EngineError("shutting down"), "x: shutting down\n", 2),
        (MemoryError(), "x: not enough memory\n", 2),
        (MemoryError("2 TB"), "x: 2 TB\n", 2),
        (FloatingPointError("the loss is nan"), "x: the loss is nan\n", 1),
    ],
)
def test_errors_that_a_command_tells(error, said, status, capsys):
    def work():
        raise error

    assert commands.run("x", work) == status
    assert capsys.readouterr().err == said


def test_an_interruption_and_a_bug(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert commands.run("x", interrupted) == 130
    assert commands.run("x", interrupted, resumable=True) == 130
    assert capsys.readouterr().err == "x: interrupted\nx: interrupted; run the same command again to continue\n"
    with pytest.raises(KeyError):
        commands.run("x", lambda: {}["a bug"])


def test_the_status_of_what_was_done():
    assert [commands.run("x", lambda status=status: status) for status in (None, 0, 1)] == [0, 0, 1]


def test_a_run_that_a_signal_stopped_is_not_complete(monkeypatch, tmp_path):
    run = types.SimpleNamespace(interrupted=True)
    monkeypatch.setattr("magma_jax.training.loop.train", lambda *arguments, **options: run)
    train = importlib.import_module("train")
    assert train.main(["--workdir", str(tmp_path)]) == commands.STOPPED == 128 + signal.SIGTERM


def test_all_commands_have_one_name(capsys):
    assert set(COMMANDS) >= {"train", "eval", "generate", "serve", "convert", "data", "plan", "retrieval"}
    for module, _ in COMMANDS.values():
        assert importlib.util.find_spec(module)
    assert magma_jax_main([]) == 0
    assert "magma-jax COMMAND --help" in capsys.readouterr().out
    assert magma_jax_main(["--version"]) == 0
    assert capsys.readouterr().out == f"{magma_jax.__version__}\n"
    assert magma_jax_main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("magma-jax: no command 'trian'; there are train, sweep, eval")


@pytest.mark.parametrize("words", [["train", "--config", "no.py"], ["eval", "--workdir", "no"], ["data", "show", "no"]])
def test_errors_and_usage_name_the_command_as_it_was_called(words, capsys):
    assert magma_jax_main(words) == 2
    assert capsys.readouterr().err.startswith(f"magma-jax {words[0]}: ")
    for more in ([], words[1:2] if words[0] == "data" else []):
        with pytest.raises(SystemExit):
            magma_jax_main([words[0], *more, "--help"])
        assert capsys.readouterr().out.startswith(" ".join(["usage: magma-jax", words[0], *more]))
    with pytest.raises(SystemExit):
        magma_jax_main([words[0], "--no-such-option"])
    assert capsys.readouterr().err.startswith(f"magma-jax {words[0]}: ")


# Builds in a fresh environment, which pip fills from the package index.
@pytest.mark.slow
def test_an_installed_package_knows_its_configs(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("configs", "magma_jax"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "-q", "-t", installed, source], check=True)
    command = ["from magma_jax.__main__ import main; main(['train', '--config', 'magma_v2', '--show'])"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "model.lm" in done.stdout
    names = {path.name for path in (installed / "magma_jax/configs").iterdir() if path.is_file()}
    assert names == {path.name for path in (ROOT / "configs").iterdir() if path.is_file()}
    assert (installed / "bin/magma-jax").exists()
