"""Worker processes of tests come from one that has imported torch already, for that takes a core some seconds.

Each is a process of its own, as ``python -m celery …`` would be: it has nothing in common with another but what torch
and pyarrow are right after their import. Whoever asks for it is its parent.
"""

import ctypes
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

#: of prctl(2)
PR_SET_CHILD_SUBREAPER = 36
_ENVIRON = dict(os.environ)


def start(
    words: Sequence[str], log: BinaryIO, env: Mapping[str, str], cwd: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start ``python -m`` these words.

    Args:
        words: a module and its arguments.
        log: file for what it says.
        env: its environment; one that changes what Python itself finds or does has a Python of its own.
        cwd: its folder.
    """
    if not _adopts() or _python_of(env) != _python_of(_ENVIRON):
        command = [sys.executable, "-m", *words]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=cwd)
    asked = {"words": list(words), "env": dict(env), "cwd": str(cwd or Path.cwd())}
    return _Born(asked["words"], _nursery().ask(asked, log))


def _python_of(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("PYTHON")}


class _Born(subprocess.Popen[bytes]):
    """A child that another process has started for us."""

    def __init__(self, words: list[str], pid: int) -> None:
        self.args, self.pid, self.returncode = words, pid, None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock = True, threading.Lock()


@cache
def _adopts() -> bool:
    """Whether the children of a child that has ended are ours."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


@cache
def _nursery() -> "_Nursery":
    return _Nursery()


class _Nursery:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:  # it ends when ours is closed
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def ask(self, what: dict[str, object], log: BinaryIO) -> int:
        socket.send_fds(self._socket, [json.dumps(what).encode()], [log.fileno()])
        answer = self._socket.recv(64)
        assert answer, "the nursery has ended"
        return int(answer)


def _serve(asked: socket.socket) -> None:
    """Start what is asked for until nobody can ask any more; returns in each new process, too."""
    import pyarrow as pa  # noqa: F401
    import torch  # noqa: F401

    while True:
        text, fds, *_ = socket.recv_fds(asked, 1 << 20, 1)
        if not text:
            return
        (log,) = fds
        pid_read, pid_write = os.pipe()
        between = os.fork()
        if not between:
            if pid := os.fork():
                os.write(pid_write, b"%d" % pid)
                os._exit(0)
            asked.close()
            os.close(pid_read)
            os.close(pid_write)
            _become(**json.loads(text), log=log)
            return
        os.waitpid(between, 0)  # from here on the new one is the child of whoever has asked
        asked.send(os.read(pid_read, 64))
        for each in (log, pid_read, pid_write):
            os.close(each)


def _become(words: list[str], env: dict[str, str], cwd: str, log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
