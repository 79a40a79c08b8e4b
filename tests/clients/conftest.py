"""A mesh of real processes for tests written against real client libraries."""

import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = ROOT / os.environ.get("MOEMESH", "target/release/moemesh")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Mesh:
    """`moemesh up` on the bundled model."""

    def __init__(self, *extra: str):
        self.http = f"127.0.0.1:{free_port()}"
        self.runtime = tempfile.TemporaryDirectory()
        self.environment = os.environ | {"XDG_RUNTIME_DIR": self.runtime.name}
        command = [BINARY, "up", "--no-demo", "--http", self.http, *extra]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=ROOT, env=self.environment)
        self.url = f"http://{self.http}"

    def wait_ready(self) -> "Mesh":
        while True:
            assert self.process.poll() is None, "the mesh ended before it was ready"
            try:
                with urllib.request.urlopen(f"{self.url}/readyz") as answer:
                    if answer.status == 200:
                        return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)

    def router_status(self) -> dict:
        """What `moemesh status --json` says of the router."""
        listed = subprocess.run([BINARY, "status", "--json"], capture_output=True, check=True, env=self.environment)
        return json.loads(listed.stdout)["routers"][0]["status"]

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait() == 0, "the mesh did not drain cleanly"
        self.runtime.cleanup()


@pytest.fixture(scope="session")
def mesh():
    running = Mesh().wait_ready()
    yield running
    running.stop()
