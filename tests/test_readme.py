"""The README's Python block runs as it stands, and its commands name what exists."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magma_jax.training.run import setup
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())
    tiny.train(tiny.run_config(steps=1), "runs/quickstart")
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save("image.png")
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"\(1, \d+, 310\) \(3, 1, \d+, 32\) \(2, 1, 2, \d+, \d+\)", capsys.readouterr().out)


def test_commands_name_files_that_exist():
    commands = re.findall(r"```bash\n(.*?)```", README, re.S)
    for name in re.findall(r"[\w/-]+\.(?:py|txt)\b", "\n".join(commands)):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (magma_jax\.\w+)", README))))
def test_commands_name_modules_that_answer(module):
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert module in result.stdout
