"""An S3 server in a process of its own, on a loopback port: moto's, over real HTTP, and what stores differ in.

moto looks whether a name is taken and takes it in two steps, which two requests could pass together. Here one request
is answered at a time, so that a conditional put is one step, as S3 promises.

Buckets behave as stores do that people have:

* ``data``: as S3;
* ``careless``: does not know ``If-None-Match``, as what is older than conditional puts;
* ``lacking``: refuses it with 501;
* ``terse``: its 412 does not say which condition has failed, as MinIO's;
* ``busy``: the first conditional put of a name gets 409, as S3 may answer while another request is under way;
* ``private``: looks at the signature, and knows nobody.

A file ``hold`` in the server's folder holds what a key contains: the first request that puts such a key waits, taking
the file for ``held``, until that is gone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from waiting import until

BUCKETS = ("data", "careless", "lacking", "terse", "busy", "private")

#: what clients need besides the server's URL; whatever else this machine knows of clouds is not asked
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nograd",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class ObjectStore:
    """A running server.

    Args:
        folder: where holds are asked for.

    Attributes:
        env: what a process needs in its environment to find the server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / "server.log").open("wb") as log:
            command = [sys.executable, __file__, str(folder)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        url = self._process.stdout.readline().strip()
        assert url, (folder / "server.log").read_text()
        self.env = {**ENVIRONMENT, "AWS_ENDPOINT_URL": url}

    def hold(self, what: str) -> None:
        """The next put of a key that contains this waits, complete but not yet decided."""
        (self._folder / "decided").unlink(missing_ok=True)
        (self._folder / "new").write_text(what)
        (self._folder / "new").rename(self._folder / "hold")

    def held(self) -> bool:
        """Whether one does."""
        return (self._folder / "held").exists()

    def release(self) -> None:
        """Let it be decided, also if whoever sent it is dead; returns when it is."""
        (self._folder / "held").unlink()
        until((self._folder / "decided").exists, "what was held is not decided")

    def stop(self) -> None:
        """End it, with what it holds."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ObjectStore]:
    """A server that this process, and what it starts meanwhile, finds behind ``s3://``."""
    server = ObjectStore(folder)
    try:
        with environment(server.env):
            yield server
    finally:
        server.stop()


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of the environment, also for clients of fsspec, which are kept for the next who asks."""
    from s3fs import S3FileSystem

    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield
    S3FileSystem.clear_instance_cache()


class _Application:
    """What the server answers."""

    def __init__(self, moto: Any, folder: Path) -> None:
        self._moto = moto
        self._folder = folder
        self._lock = threading.Lock()
        self._asked: set[str] = set()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        bucket, _, key = environ["PATH_INFO"].strip("/").partition("/")
        conditional = environ["REQUEST_METHOD"] in ("PUT", "POST") and environ.get("HTTP_IF_NONE_MATCH") == "*"
        held = False
        if environ["REQUEST_METHOD"] == "PUT":
            length = environ.get("CONTENT_LENGTH")  # none if it comes in pieces, whose end is known
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(*[int(length)] if length else []))
            held = self._wait(key)
        if conditional and bucket == "careless":
            del environ["HTTP_IF_NONE_MATCH"]
        if conditional and bucket == "lacking":
            return _error(
                start_response,
                "501 Not Implemented",
                "NotImplemented",
                "A header you provided implies functionality that is not implemented",
            )
        with self._lock, self._decided(held=held):
            if conditional and bucket == "busy" and key not in self._asked:
                self._asked.add(key)
                return _error(start_response, "409 Conflict", "ConditionalRequestConflict", "A conflicting operation")
            return self._answer(bucket, environ, start_response)

    def _wait(self, key: str) -> bool:
        """Wait, if that is asked for; whether it was."""
        try:
            if (self._folder / "hold").read_text() not in key:
                return False
            (self._folder / "hold").rename(self._folder / "held")
        except FileNotFoundError:
            return False
        while (self._folder / "held").exists():
            time.sleep(0.01)
        return True

    @contextlib.contextmanager
    def _decided(self, *, held: bool) -> Iterator[None]:
        yield
        if held:
            (self._folder / "decided").touch()

    def _answer(self, bucket: str, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        from moto.core.authorization import enable_iam_authentication

        told: list[Any] = []
        with enable_iam_authentication() if bucket == "private" else contextlib.nullcontext():
            body = b"".join(self._moto(environ, lambda *args: told.append(args)))
        status, headers = told[0][:2]
        if bucket == "terse" and status.startswith("412"):
            body = re.sub(b"<Condition>.*?</Condition>", b"", body)
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [body]


def _error(start_response: Any, status: str, code: str, message: str) -> Iterable[bytes]:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body.encode())))])
    return [body.encode()]


def _serve(folder: Path) -> None:
    from moto.backends import get_backend
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    for name in BUCKETS:
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(name, "us-east-1")
    application = _Application(DomainDispatcherApplication(create_backend_app), folder)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    print(f"http://127.0.0.1:{server.port}", flush=True)  # noqa: T201 - for who has started it
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until who has started it ends, however that comes


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
