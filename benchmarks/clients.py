"""Tests a server with third-party clients, each in its own environment, and reports which work.

    python benchmarks/clients.py --checkpoint runs/quickstart --install --markdown docs/clients.md

Starts a server of the quick start (or uses one at ``--url``), runs each client's ``client_checks``, and prints a table.
``--install`` creates the environments (10 GB with guidellm and lmms-eval, which need PyTorch); clients without one are
skipped and listed. The two evaluation harnesses ask 20 held-out questions in their own wording.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from magma_jax.data.openmoji import drawings as openmoji

CHECKS = Path(__file__).parent / "client_checks"
QUESTIONS = 20
# Timeout in seconds for all checks of one client, on a slow machine.
LIMIT = 900


@dataclasses.dataclass(frozen=True)
class Client:
    """A client of OpenAI-compatible servers.

    Attributes:
        name: name of the client and of its environment.
        package: package whose version is reported.
        command: command to run, with placeholders ``{python}``, ``{environment}``, ``{checks}``, ``{url}``, ``{root}``,
            ``{model}``, ``{folder}`` and ``{tokenizer}``.
        needs: packages to install.
        alone: packages to install without their many unused dependencies.
        check: name of the check, for programs that print no results themselves.
    """

    name: str
    package: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    alone: tuple[str, ...] = ()
    check: str | None = None

    @property
    def is_javascript(self) -> bool:
        """Whether it comes from npm."""
        return self.command[0] == "node"


def _python(file: str) -> tuple[str, ...]:
    return ("{python}", f"{{checks}}/{file}", "{url}", "{model}", "{folder}")


def _node(which: str) -> tuple[str, ...]:
    return ("node", "{environment}/openai_sdk.mjs", "{url}", "{model}", "{folder}", which)


_NPM = ("openai", "ai", "@ai-sdk/openai-compatible", "zod")
CLIENTS = (
    Client("openai-python", "openai", _python("openai_sdk.py"), ("openai",)),
    Client("openai-js", "openai", _node("openai"), _NPM),
    Client("ai-js", "ai", _node("ai"), _NPM),
    Client("litellm", "litellm", _python("litellm_client.py"), ("litellm",)),
    Client("langchain-openai", "langchain-openai", _python("langchain_client.py"), ("langchain-openai",)),
    Client("instructor", "instructor", _python("instructor_client.py"), ("instructor",)),
    Client(
        "guidellm",
        "guidellm",
        (
            "{environment}/bin/guidellm",
            "run",
            "--disable-console-interactive",
            "--backend",
            "kind=openai_http,target={root},model={model}",
            "--profile",
            "kind=concurrent,streams=4",
            "--constraint",
            "kind=max_requests,count=24",
            "--tokenizer",
            "kind=huggingface_auto,model={tokenizer}",
            "--data",
            "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
            "--output",
            "kind=json,path={folder}/guidellm.json",
        ),
        ("guidellm",),
        check="24 requests, 4 at a time",
    ),
    Client(
        "aiperf",
        "aiperf",
        (
            *(
                "{environment}/bin/aiperf",
                "profile",
                "--model",
                "{model}",
                "--url",
                "{root}",
                "--endpoint-type",
                "chat",
            ),
            *("--streaming", "--use-server-token-count", "--per-chunk-usage", "--tokenizer", "{tokenizer}"),
            *("--concurrency", "4", "--request-count", "24", "--prompt-input-tokens-mean", "32"),
            *("--prompt-output-tokens-mean", "16", "--extra-inputs", "ignore_eos:true", "--image-width-mean", "64"),
            *("--image-height-mean", "64", "--ui", "none", "--artifact-dir", "{folder}/aiperf"),
        ),
        ("aiperf",),
        check="24 requests with images, 4 at a time",
    ),
    Client(
        "lmms-eval",
        "lmms-eval",
        _python("lmms_eval_client.py"),
        (
            *("torch", "transformers", "evaluate", "accelerate", "loguru", "openai", "python-dotenv", "tqdm", "pyyaml"),
            *("pytz", "jinja2", "pydantic", "pillow", "numpy"),
        ),
        alone=("lmms-eval",),
    ),
    Client(
        "vlmevalkit",
        "ms-vlmeval",
        _python("vlmevalkit_client.py"),
        (
            *("pandas", "validators", "huggingface_hub", "sty", "filelock", "requests", "pillow", "numpy"),
            "python-dotenv",
        ),
        alone=("ms-vlmeval",),
    ),
)


def main() -> int:
    """Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--url", help="of a server that runs already, such as http://127.0.0.1:8000")
    parser.add_argument("--environments", type=Path, default=Path(".clients"), help="folder; default: %(default)s")
    parser.add_argument("--install", action="store_true", help="make environments that are missing")
    parser.add_argument("--only", nargs="*", choices=[client.name for client in CLIENTS], help="these clients")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    chosen = [client for client in CLIENTS if not arguments.only or client.name in arguments.only]
    results: list[tuple[Client, str, list[dict]]] = []
    with tempfile.TemporaryDirectory() as folder:
        places = {"folder": folder, "checks": str(CHECKS), "tokenizer": str(Path(folder) / "tokenizer")}
        write_questions(Path(folder))
        write_tokenizer(Path(arguments.checkpoint) / "tokenizer", Path(places["tokenizer"]))
        running = contextlib.nullcontext(arguments.url) if arguments.url else server(arguments.checkpoint)
        with running as root:
            with urllib.request.urlopen(f"{root}/v1/models") as response:
                places["model"] = json.load(response)["data"][0]["id"]
            places |= {"root": root, "url": f"{root}/v1"}
            for client in chosen:
                environment = (arguments.environments / client.name).absolute()
                if not environment.is_dir() and arguments.install:
                    install(client, environment)
                rows = checked(client, environment, places)
                results.append((client, version(client, environment), rows))
                print(table([results[-1]]), flush=True)
    if arguments.markdown:
        write_page(arguments.markdown, results)
    return int(any(not row["ok"] for _, _, rows in results for row in rows))


def install(client: Client, environment: Path) -> None:
    """Creates the environment of a client, and removes it again if that fails."""
    print(f"installing {client.name}", file=sys.stderr, flush=True)
    try:
        if client.is_javascript:
            environment.mkdir(parents=True)
            for command in (["npm", "init", "--yes"], ["npm", "install", *client.needs]):
                subprocess.run(command, cwd=environment, check=True, stdout=subprocess.DEVNULL)
            return
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if client.alone:
            subprocess.run([*pip, "--no-deps", *client.alone], check=True)
        subprocess.run([*pip, *client.needs], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(environment, ignore_errors=True)
        print(f"{client.name} cannot be installed: {error}", file=sys.stderr)


def checked(client: Client, environment: Path, places: dict[str, str]) -> list[dict]:
    """Results of the checks of a client."""
    if not environment.is_dir():
        return [{"check": "-", "ok": False, "says": "not installed; add --install"}]
    if client.is_javascript:  # node resolves modules next to the file
        shutil.copy(CHECKS / "openai_sdk.mjs", environment)
    filled = {**places, "environment": str(environment), "python": str(environment / "bin/python")}
    command = [part.format(**filled) for part in client.command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=places["folder"])
    except subprocess.TimeoutExpired:
        return [{"check": client.check or "-", "ok": False, "says": f"not done within {LIMIT} s"}]
    if client.check is not None:
        failed = failures(Path(places["folder"]), client.name) if done.returncode == 0 else last_line(done)
        return [{"check": client.check, "ok": not failed, "says": failed or "every request was answered"}]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode:
        rows.append({"check": "the whole", "ok": False, "says": last_line(done)})
    return rows


def last_line(done: subprocess.CompletedProcess) -> str:
    """The last line of a program's output."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1][:300] if lines else f"ended with {done.returncode}"


def failures(folder: Path, name: str) -> str:
    """Unanswered requests according to a load generator's report; empty if there are none."""
    if name == "guidellm":
        report = json.loads((folder / "guidellm.json").read_text())
        totals = report["benchmarks"][0]["metrics"]["request_totals"]
        done, errors = totals["successful"], totals["errored"] + totals["incomplete"]
    else:
        report = json.loads(next((folder / "aiperf").rglob("profile_export_aiperf.json")).read_text())
        done, errors = report["request_count"]["avg"], (report.get("error_request_count") or {"avg": 0})["avg"]
    return "" if done == 24 and not errors else f"{done:g} of 24 answered, {errors:g} failed"


def version(client: Client, environment: Path) -> str:
    """Version of the client's package."""
    if client.is_javascript:
        file = environment / "node_modules" / client.package / "package.json"
        return json.loads(file.read_text())["version"] if file.is_file() else "-"
    found = importlib.metadata.distributions(
        name=client.package, path=[str(path) for path in environment.glob("lib/python*/site-packages")]
    )
    return next((each.version for each in found), "-")


def table(results: list[tuple[Client, str, list[dict]]]) -> str:
    """Markdown rows, one per check."""
    lines = []
    for client, number, rows in results:
        for i, row in enumerate(rows):
            name = f"{client.name} {number}" if i == 0 else ""
            says = row["says"].replace("|", "\\|").replace("\n", " ")[:160]
            lines.append(f"| {name} | {row['check']} | {'yes' if row['ok'] else 'no'} | {says} |")
    return "\n".join(lines)


def write_page(file: Path, results: list[tuple[Client, str, list[dict]]]) -> None:
    """The page of the documentation."""
    rows = [row for _, _, found in results for row in found]
    file.write_text(
        "# Clients\n\nResults of client software with a server of the quick start, generated by\n"
        "`python benchmarks/clients.py --install --markdown docs/clients.md`, which creates an environment for each "
        "client. The\nserver runs with `--cut-max-tokens` and the quick start's template, `qa` "
        "([serving.md](serving.md#templates)).\n\n"
        f"{sum(row['ok'] for row in rows)} of {len(rows)} checks pass.\n\n"
        f"| client | check | passes | result |\n|---|---|---|---|\n{table(results)}\n"
    )


def write_questions(folder: Path) -> None:
    """Writes held-out questions and their images for ``checks.questions``."""
    images, pixels = openmoji.load(Path("~/.cache/magma_jax").expanduser())
    asked = openmoji.questions([image for image in images if image.split == "test"])
    chosen = [asked[i] for i in np.random.default_rng(0).choice(len(asked), QUESTIONS, replace=False)]
    rows = []
    for i, sample in enumerate(chosen):
        Image.fromarray(pixels[sample.image]).save(folder / f"{i}.png")
        question = sample.prompt.removeprefix("Q: ").removesuffix(" A:")
        rows.append({"picture": f"{i}.png", "question": question, "answer": sample.answer.strip()})
    (folder / "questions.json").write_text(json.dumps(rows))


def write_tokenizer(source: Path, folder: Path) -> None:
    """Writes a checkpoint's tokenizer in transformers' format; load generators count tokens with it."""
    shutil.copytree(source, folder)
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@contextlib.contextmanager
def server(checkpoint: str) -> Iterator[str]:
    """URL of a server of ``checkpoint`` that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "magma_jax.serve", "--checkpoint", checkpoint, "--port", str(port)]
    process = subprocess.Popen([*command, "--cut-max-tokens"])
    try:
        while not _is_ready(f"http://127.0.0.1:{port}"):
            if process.poll() is not None:
                sys.exit(f"the server has ended with {process.returncode}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _is_ready(root: str) -> bool:
    try:
        with urllib.request.urlopen(f"{root}/health", timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
