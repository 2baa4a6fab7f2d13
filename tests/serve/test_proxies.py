"""docs/launch/serving.md: its files as the programs they are for read them, and a server behind its two proxies."""

import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml

from magma_jax.inference.image_queue import ImageQueue
from magma_jax.serve.__main__ import main as serve
from magma_jax.serve.config import ServerConfig
from tests.serve.drawing import Drawer
from tests.serve.running import Running

PAGE = (Path(__file__).parents[2] / "docs/launch/serving.md").read_text()
HOST, ROOT = "magma.example", "/magma"


def block(language, number=0):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)[number]


def program(name):
    # Debian keeps nginx where only root looks.
    found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def running():
    drawer = Drawer()
    config = ServerConfig("drawer", timeout=20, root_path=ROOT, hosts=frozenset({HOST}))
    server = Running(ImageQueue(drawer, 4), config)
    server.drawer = drawer
    yield server
    server.stop()


def nginx(folder, port, upstream):
    """nginx with the block of the page, without TLS and on a free port."""
    text = block("nginx").replace("listen 443 ssl;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8000", upstream)
    text = re.sub(r" *ssl_certificate.*\n", "", text)
    file = folder / "nginx.conf"
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{text}\n}}\n"
    )
    return [program("nginx"), "-c", str(file), "-e", str(folder / "errors")], {}


def caddy(folder, port, upstream):
    text = (
        block("caddyfile").replace("magma.example {", f"http://{HOST}:{port} {{", 1).replace("127.0.0.1:8000", upstream)
    )
    (folder / "Caddyfile").write_text("{\n\tadmin off\n}\n" + text)
    environment = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    return [program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"], environment


@pytest.mark.parametrize("proxy", [nginx, caddy])
def test_a_stream_passes_a_proxy_event_by_event(proxy, running, tmp_path, monkeypatch):
    port = free_port()
    command, environment = proxy(tmp_path, port, f"127.0.0.1:{running.port}")
    with (
        open(tmp_path / "output", "wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            # One canvas for each release: a proxy that waits for more of the stream would get no more.
            gate = threading.Semaphore(0)
            monkeypatch.setattr(running.drawer, "go", SimpleNamespace(wait=gate.acquire))
            address = {"base_url": f"http://127.0.0.1:{port}", "headers": {"Host": f"{HOST}:{port}"}, "timeout": 20}
            with httpx.Client(**address) as client:
                for _ in range(100):
                    try:
                        client.get("/")
                        break
                    except httpx.ConnectError:
                        time.sleep(0.05)
                moved = client.get(ROOT)
                assert (moved.status_code, httpx.URL(moved.headers["location"]).path) in (
                    (301, "/magma/"),
                    (302, "/magma/"),
                )
                assert client.get(f"{ROOT}/health").json() == {"status": "ok"}
                assert "<title>" in client.get(f"{ROOT}/").text
                body = {"prompt": "red", "stream": True, "partial_images": 1}
                own, other = ({"Origin": f"https://{name}"} for name in (f"{HOST}:{port}", "elsewhere.example"))
                assert client.post(f"{ROOT}/v1/images/generations", json=body, headers=other).status_code == 403
                with client.stream("POST", f"{ROOT}/v1/images/generations", json=body, headers=own) as stream:
                    assert stream.status_code == 200
                    lines = (line for line in stream.iter_lines() if line.startswith("event:"))
                    gate.release()
                    assert next(lines) == "event: image_generation.partial_image"
                    gate.release()
                    assert next(lines) == "event: image_generation.completed"
                # 8 MB: more than nginx takes by default, and more than the server takes without images.
                large = client.post(f"{ROOT}/v1/images/generations", json={"prompt": "a" * 8_000_000})
                assert large.status_code == 413
                assert large.json()["error"]["message"]
        finally:
            gate.release(9)
            process.terminate()


def test_systemd_reads_the_unit(tmp_path):
    program("systemd-analyze")
    text = block("ini").replace("/opt/magma/venv/bin/python", "/bin/true").replace("User=magma\n", "")
    (tmp_path / "magma.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "magma.service")], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stderr.splitlines() if "magma.service" in line] == []


def test_prometheus_reads_its_part(tmp_path):
    (tmp_path / "prometheus.yml").write_text(block("yaml", 1))
    done = subprocess.run(
        [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_the_metrics(running):
    text = running.get("/metrics").text
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_know_their_options(capsys):
    with pytest.raises(SystemExit):
        serve(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    unit = block("ini")
    deployment, service = yaml.safe_load_all(block("yaml"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    for text in (unit.split("magma_jax.serve")[1].split("LoadCredential")[0], " ".join(container["args"])):
        assert set(re.findall(r"--[a-z-]+", text)) <= known
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
