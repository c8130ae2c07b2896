"""A real container engine for tests: a dockerd that nobody else uses, and images made here.

It has a socket, state and data of its own in a folder that goes with it, no bridge and no firewall
rules, so that it collides with nothing. It needs root and what `scripts/debian-docker.sh` installs;
where it cannot be had, the tests that ask for it are skipped and say why.

    with private_docker() as docker:
        docker("run", "--network", "host", docker.image, "echo", "hello")
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar, Final

import pytest
from serving import Prompt, Server

CALL_SECONDS: Final = 100.0
START_SECONDS: Final = 90.0
STOP_SECONDS: Final = 60.0
TOOLS: Final = ("dockerd", "docker", "busybox")
INSTALL: Final = "scripts/debian-docker.sh installs it on Debian as root"


class Docker:
    """An engine that runs, and its command line."""

    image: ClassVar[str] = "tiny:1"
    """Busybox with a link for each of its commands in /bin, and no entrypoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "dockerd.log"
        self.environment: Mapping[str, str] = {
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "DOCKER_CONFIG": str(folder / "config"),
        }
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(
                [
                    "dockerd",
                    f"--data-root={folder}/data",
                    f"--exec-root={folder}/exec",
                    f"--pidfile={folder}/pid",
                    f"--host={self.environment['DOCKER_HOST']}",
                    "--bridge=none",
                    "--iptables=false",
                    "--shutdown-timeout=1",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __call__(self, *words: str, text: bytes = b"") -> str:
        """Call the engine; returns what it says."""
        done = self._run(*words, text=text)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr.decode()}"
        return done.stdout.decode().strip()

    def answers(self) -> bool:
        """Whether it can be spoken to."""
        return self._run("version").returncode == 0

    def _run(self, *words: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["docker", *words],
            input=text,
            capture_output=True,
            env={**os.environ, **self.environment},
            timeout=CALL_SECONDS,
            check=False,
        )

    def containers(self, **filters: str) -> list[str]:
        """The names of its containers, those that do not run included."""
        given = [f"--filter={name}={value}" for name, value in filters.items()]
        return self("ps", "--all", "--format={{.Names}}", *given).split()

    def load(self, tag: str, *changes: str) -> None:
        """Make an image of busybox, with lines of a Dockerfile such as `ENTRYPOINT [...]`."""
        words = [word for change in ("ENV PATH=/bin", *changes) for word in ("--change", change)]
        self("import", *words, "-", tag, text=root_files())

    def end(self) -> None:
        """Stop it, and leave nothing behind: no process, no mount, no file."""
        try:
            if self.daemon.poll() is None and self.answers():
                for name in self.containers():
                    self._run("rm", "--force", "--volumes", name)  # it may be gone meanwhile
        finally:
            self._end_daemon()

    def _end_daemon(self) -> None:
        self.daemon.terminate()
        try:
            self.daemon.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        # What outlives a killed daemon: containerd and the shims, and below them containers.
        for pid in processes_with(str(self.folder)):
            for one in (pid, *children_of(pid)):
                try:
                    os.kill(one, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has ended meanwhile
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([one for one in mounts if one.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", mount], check=False)  # it may be gone meanwhile
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def private_docker() -> Iterator[Docker]:
    """Start an engine that has the image `tiny:1`, or skip the test if there can be none."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"NO CONTAINER ENGINE: {tool} is not installed; {INSTALL}")
    if os.geteuid() != 0:
        pytest.skip("NO CONTAINER ENGINE: only root can start a dockerd of its own")
    # Not below pytest's own folder: the path of a socket may have no more than 107 characters.
    docker = Docker(Path(tempfile.mkdtemp(prefix="dockerd-")))
    try:
        deadline = time.monotonic() + START_SECONDS
        while not docker.answers():
            if docker.daemon.poll() is not None or time.monotonic() > deadline:
                lines = docker.log.read_text().splitlines()[-3:]
                pytest.skip(f"NO CONTAINER ENGINE: dockerd cannot start here: {' | '.join(lines)}")
            time.sleep(0.05)
        docker.load(Docker.image)
        yield docker
    finally:
        docker.end()


def root_files() -> bytes:
    """Write the files of an image: busybox, and a link for each of its commands."""
    busybox = str(shutil.which("busybox"))
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for folder in ("bin", "tmp", "etc", "work"):
            made = tarfile.TarInfo(folder)
            made.type, made.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(made)
        tar.add(Path(busybox).resolve(), "bin/busybox")
        for name in set(names.split()) - {"busybox"}:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return stream.getvalue()


def processes_with(word: str) -> list[int]:
    """The processes that have a word in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        if word in words and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in own for one in (int(child), *children_of(int(child)))]


# --- a registry -----------------------------------------------------------------------------------


class Registry:
    """A registry on loopback with one image of busybox, `repository:1`; others do not exist.

    As much of the distribution protocol as a pull needs, without TLS, as engines take it there.
    """

    def __init__(self, before: Callable[[], object]) -> None:
        layer = root_files()
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64")
        config = json.dumps(
            {
                "architecture": machine,
                "os": "linux",
                "config": {"Env": ["PATH=/bin"], "Cmd": ["echo", "pulled"]},
                "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
            }
        ).encode()
        kind = "application/vnd.docker."
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": f"{kind}distribution.manifest.v2+json",
                "config": described(f"{kind}container.image.v1+json", config),
                "layers": [described(f"{kind}image.rootfs.diff.tar", layer)],
            }
        ).encode()
        image = "/v2/repository"
        served = {f"{image}/blobs/{digest(blob)}": blob for blob in (config, layer)}
        served |= {f"{image}/manifests/{name}": manifest for name in ("1", digest(manifest))}
        served["/v2/"] = b"{}"

        class Blobs(Prompt, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/manifests/" in self.path:
                    before()
                body = served.get(self.path)
                self.send_response(404 if body is None else 200)
                if "/manifests/" in self.path:
                    self.send_header("Content-Type", f"{kind}distribution.manifest.v2+json")
                    self.send_header("Docker-Content-Digest", digest(manifest))
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if self.command == "GET" and body:
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

        self.server = Server(Blobs)
        self.name = f"127.0.0.1:{self.server.server_port}"


@contextmanager
def registry(before: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Serve a registry; gives its host and port. `before` is called before a manifest is given."""
    made = Registry(before)
    with made.server.serving():
        yield made.name


def digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def described(kind: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": kind, "size": len(blob), "digest": digest(blob)}
