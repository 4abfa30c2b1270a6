"""Two gateways on one PostgreSQL behind a real nginx, with deploy/nginx.conf but for its places."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from selfroute.tasks.countdown import Countdown, CountdownConfig
from tests.postgres import server as postgres_server
from tests.serving import command

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NAME = "gateway.example.org"

AROUND = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/selfroute.conf;
}}
"""


@contextmanager
def nginx(folder: Path, *upstreams: str) -> Iterator[str]:
    """The URL of one in front of these; needs Debian's package `nginx-light`."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    assert program, "this test needs nginx: apt-get install nginx-light"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    certify = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={NAME}"]
    subprocess.run(
        [*certify, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    text = CONF.read_text()
    for ours, here in {
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        f"/etc/ssl/{NAME}.pem": f"{folder}/cert.pem",
        f"/etc/ssl/private/{NAME}.key": f"{folder}/key.pem",
        "10.0.0.11:8000": upstreams[0],
        "10.0.0.12:8000": upstreams[1],
    }.items():
        assert ours in text
        text = text.replace(ours, here)
    (folder / "selfroute.conf").write_text(text)
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder))
    start = [program, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    subprocess.run([*start, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(start)
    try:
        by = time.monotonic() + 20
        while True:
            assert process.poll() is None, (folder / "error.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < by
                time.sleep(0.02)
        yield f"https://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_two_gateways_behind_nginx(tmp_path: Path) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(postgres_server())
        settings = [
            "device.name=tests.serving:NamedDevice", "device.pause_s=0.2", "device.tells_pid=true", f"store={store}",
            f"hosts=['{NAME}']", "budget.share=0.125", "budget.min_requests=40",
            "cloud.name=oracle", "cloud.accuracy=1",
        ]  # fmt: skip
        first, first_url = stack.enter_context(command(*settings, "device.asks=true"))
        second, second_url = stack.enter_context(command(*settings, "device.asks=true"))
        ports = [url.removeprefix("http://").removesuffix("/v1") for url in (first_url, second_url)]
        url = stack.enter_context(nginx(tmp_path, *ports))
        question = Countdown(CountdownConfig()).load("test")[0].question
        body: dict[str, Any] = {"model": "selfroute", "messages": [{"role": "user", "content": question}]}

        async def main() -> None:
            headers = {"host": NAME}
            async with httpx2.AsyncClient(base_url=url, headers=headers, verify=False, timeout=60) as client:

                async def route() -> tuple[str, str]:
                    answered = (await client.post("/chat/completions", json=body)).json()
                    return answered["selfroute"]["route"], answered["choices"][0]["message"]["content"]

                # One budget, whichever gateway answers.
                answers = await asyncio.gather(*(route() for _ in range(12)))
                assert Counter(route for route, _ in answers) == {"cloud": 5, "device": 7}
                # The denied ones are answered by the device, which tells its process.
                assert {pid for route, pid in answers if route == "device"} == {str(first.pid), str(second.pid)}

                # Reasoning comes through before the answer is there.
                at = []
                async with client.stream("POST", "/chat/completions", json={**body, "stream": True}) as stream:
                    async for line in stream.aiter_lines():
                        if line.startswith("data: {"):
                            at.append(time.monotonic())
                assert stream.status_code == 200
                assert at[-1] - at[0] > 0.3

                # A client that goes away is gone for the gateway, too.
                async with client.stream("POST", "/chat/completions", json={**body, "stream": True}) as stream:
                    await anext(stream.aiter_lines())
                by = time.monotonic() + 20
                while not gone(store):
                    assert time.monotonic() < by
                    await asyncio.sleep(0.05)

                # One of the two can be stopped.
                first.send_signal(signal.SIGTERM)
                assert first.wait(30) == 0
                answers = await asyncio.gather(*(route() for _ in range(6)))
                assert {pid for _, pid in answers} == {str(second.pid)}

        asyncio.run(main())


def gone(store: str) -> bool:
    with psycopg.connect(store) as connection:
        row = connection.execute("SELECT COUNT(*) FROM requests WHERE error = 'client_gone'").fetchone()
    return row == (1,)
