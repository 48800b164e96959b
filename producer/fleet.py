"""A whole fleet on this machine, for ``nograd up`` and ``nograd demo``: Redis, workers, Flower."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from nograd.tasks.errors import BrokerUnavailable, ConfigError
from nograd.tasks.hints import install
from nograd.tasks.modelfile import load_model_file

from .client import Client
from .embedded import HOST, EmbeddedRedis
from .processes import Child

#: seconds Flower has to answer on its address
FLOWER_READY_TIMEOUT_S = 60.0
#: tasks Flower remembers, about 4.4 KB each; its own default of 100,000 would take half a gigabyte
FLOWER_MAX_TASKS = 10_000
FLOWER_PORT = 5555


class Fleet:
    """Starts Redis, the workers of this machine and, when they are ready, Flower; stops them in the reverse order.

    Flower asks workers for their queues as it starts, and not again: one that is not there yet would not be shown.

    Args:
        models: the model file.
        redis_url: a Redis to use instead of a private one; ``NOGRAD_REDIS_URL`` counts as well.
        folder: where a private Redis keeps its data across starts; None for a temporary folder.
        gpus: as ``nograd worker --gpus``.
        concurrency: messages in flight in each worker; None for the worker's own choice.
        flower_port: Flower's port; None for no Flower.
        logs: folder for the output of workers and Flower; None leaves it on our stderr.
        env: added to the environment of the workers.
    """

    def __init__(
        self,
        models: Path,
        *,
        redis_url: str | None = None,
        folder: Path | None = None,
        gpus: str = "all",
        concurrency: int | None = None,
        flower_port: int | None = FLOWER_PORT,
        logs: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.models = models
        self.flower_port = flower_port
        self.url = ""
        self._redis_url = redis_url
        self._folder = folder
        self._worker_args = ["--gpus", gpus, *(["--concurrency", str(concurrency)] if concurrency else [])]
        self._logs = logs
        self._env = dict(env or {})
        self._stack = contextlib.ExitStack()
        self._children: list[Child] = []
        self._started_at = 0.0

    @property
    def flower_url(self) -> str | None:
        """Flower's address, if it runs."""
        return None if self.flower_port is None else f"http://{HOST}:{self.flower_port}"

    def start(self) -> Self:
        """Start Redis and the workers, and return without waiting for the models; `wait_ready` goes on.

        Raises:
            ConfigError: if something needed is not installed, or the model file is wrong.
            BrokerUnavailable: if a Redis was given and does not answer.
        """
        require_worker()
        if self.flower_port is not None:
            require_flower()
            _require_free(self.flower_port)
        load_model_file(self.models)  # a wrong file is told here, in one line, not from a worker's log
        with contextlib.ExitStack() as stack:
            self.url = self._open_redis(stack)
            self._started_at = time.time()
            self._spawn(stack, "worker", worker_command(self.models, self._worker_args), self._env)
            self._stack = stack.pop_all()
        return self

    def stop(self) -> None:
        """Stop everything that was started; jobs on a device end first."""
        self._stack.close()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until every model is loaded; then start Flower, and wait until it answers.

        Args:
            timeout_s: seconds the models may take; None for ever (weights may have to be downloaded).

        Raises:
            ConfigError: if a process ends or takes too long; with the end of its log.
        """
        names = set(load_model_file(self.models).specs)
        with Client(self.url, models=self.models) as client:
            self._wait("worker", lambda: self._serves(client, names), timeout_s)
        port = self.flower_port
        if port is not None:
            self._spawn(self._stack, "flower", flower_command(port))
            self._wait("flower", lambda: flower_answers(port), FLOWER_READY_TIMEOUT_S)

    def dead(self) -> Child | None:
        """A process that has ended by itself, if there is one."""
        return next((child for child in self._children if not child.running), None)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _open_redis(self, stack: contextlib.ExitStack) -> str:
        given = self._redis_url or os.environ.get("NOGRAD_REDIS_URL")
        if not given:
            server = stack.enter_context(EmbeddedRedis(self._folder))
            self._children.append(server.process)
            return server.url
        with Client(given) as client:
            client.models()  # whether it answers: a worker would wait for it for ever
        return given

    def _spawn(
        self, stack: contextlib.ExitStack, name: str, argv: list[str], env: Mapping[str, str] | None = None
    ) -> None:
        # The URL holds a password: it travels in the environment, which other users cannot read.
        environment = {**os.environ, "NOGRAD_REDIS_URL": self.url, **(env or {})}
        log = None if self._logs is None else self._logs / f"{name}.log"
        self._children.append(stack.enter_context(Child(name, argv, env=environment, log=log)))

    def _serves(self, client: Client, names: set[str]) -> bool:
        try:
            ready = {name for name, card in client.models().items() if card.seen_at >= self._started_at}
            return ready >= names and client.broker.answers()
        except BrokerUnavailable:
            return False

    def _wait(self, name: str, ready: Callable[[], bool], timeout_s: float | None) -> None:
        child = next(child for child in self._children if child.name == name)
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not ready():
            if not child.running:
                raise ConfigError(f"{name} ended with {child.exit_code}\n{child.log_tail()}".rstrip())
            if time.monotonic() > deadline:
                raise ConfigError(f"{name} is not ready after {timeout_s:.0f} s\n{child.log_tail()}".rstrip())
            time.sleep(0.1)


def worker_command(models: Path, args: list[str]) -> list[str]:
    """The command that runs the workers of this machine."""
    return [sys.executable, "-m", "nograd.producer.cli", "worker", "--models", str(models), *args]


def flower_command(port: int, *args: str) -> list[str]:
    """The command that runs Flower on loopback."""
    return [
        *(sys.executable, "-m", "celery", "-A", "nograd.tasks", "flower"),
        *(f"--address={HOST}", f"--port={port}", f"--max-tasks={FLOWER_MAX_TASKS}", *args),
    ]


def flower_answers(port: int) -> bool:
    """Whether Flower's page is there."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def require_worker() -> None:
    """Check that workers can run here.

    Raises:
        ConfigError: if the extra is missing, saying how to install it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"workers need torch and its family: {install('worker')}")


def _require_free(port: int) -> None:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        raise ConfigError(f"port {port} is taken; give Flower another with --port, or --no-flower") from None


def require_flower() -> None:
    """Check that Flower is installed.

    Raises:
        ConfigError: if it is not, saying how to install it.
    """
    if importlib.util.find_spec("flower") is None:
        raise ConfigError(f"Flower is not installed: {install('flower')}")
