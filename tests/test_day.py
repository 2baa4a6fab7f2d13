"""The commands of docs/day.md, from an empty folder to a server, with few steps."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# ``magma-jax`` as the page calls it; training takes few and small steps.
COMMAND = """#!{python}
import sys
from magma_jax.__main__ import main
if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "train":
        words += [] if "--set" in words else ["--set"]
        words += ["steps=12", "batch_size=8", "log_every=1", "watch.samples_every=0", "optim.schedule=constant"]
        words += ["optim.warmup_steps=0", "validation.every=6"]
        words += ["data.workers=0"] if "own_data" in words else ["evaluate=False"]
    sys.exit(main(words))
"""
# In place of ``timeout``: SIGTERM comes after the first step.
TIMEOUT = """#!{python}
import pathlib, subprocess, sys, time
process = subprocess.Popen(sys.argv[3:])
metrics = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1]) / "metrics.jsonl"
while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
    time.sleep(0.01)
process.terminate()
sys.exit(process.wait())
"""


@pytest.mark.slow
def test_a_day_from_an_empty_folder_to_a_server(tmp_path):
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "docs/day.md").read_text(), re.M | re.S)
    (tmp_path / "bin").mkdir()
    for name, text in {"magma-jax": COMMAND, "timeout": TIMEOUT}.items():
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    (*_, (_, ask)) = blocks
    (elsewhere / "ask.py").write_text(ask.replace(":8000/", f":{port}/"))
    said = ""
    for language, text in blocks[1:-1]:
        text = text.replace("8000", port)
        moved = (elsewhere / "model").exists()
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
        begun = time.monotonic()
        done = subprocess.run(
            command, cwd=elsewhere if moved else work, env=environment, capture_output=True, text=True, check=False
        )
        print(f"{(time.monotonic() - begun) / 60:.1f} minutes: {text.splitlines()[-1]}")
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        # The server ends by SIGTERM, which it says; nothing else may warn.
        assert "Warning" not in done.stderr, done.stderr
        said += done.stdout + done.stderr
        if (work / "model").exists():
            # On another machine there are neither runs nor data.
            shutil.move(work / "model", elsewhere / "model")
            shutil.move(work / "photos", elsewhere / "photos")
            shutil.rmtree(work / "runs")
    assert len([name for name in ("train", "validation", "test") if f"data/mine/{name}: " in said]) == 3
    assert re.search(r"SIGTERM: stopped after step \d+ of 12, which is saved", said)
    assert "less A" in said
    assert (work / "comparison.html").stat().st_size > 1000
