"""`nograd up`, `worker`, `flower` and `demo` as whole processes: what they start, and that nothing of it stays."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from nograd.producer import Client, cli, fleet
from nograd.producer.demo import Examples, jobs_in_flower, same_answer
from nograd.producer.embedded import free_port
from nograd.tasks import BrokerUnavailable, ConfigError
from waiting import PATIENCE_S, until

pytest.importorskip("torch")

NOGRAD = Path(sys.executable).with_name("nograd")
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = """\
class Doubler:
    def load(self, device):
        pass

    def prepare(self, input):
        return float(input)

    def forward(self, batch):
        return [2 * number for number in batch]

    def finish(self, output):
        return output
"""


@pytest.fixture
def models(tmp_path):
    (tmp_path / "tiny_models.py").write_text(TINY)
    file = tmp_path / "models.toml"
    file.write_text('[double]\nloader = "python"\nclass = "tiny_models:Doubler"\n')
    return file


@contextmanager
def started(*words, log):
    """A command in the foreground: the process, ended at the latest by us."""
    with log.open("wb") as out:
        process = subprocess.Popen([NOGRAD, *map(str, words)], stdout=subprocess.PIPE, stderr=out)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def descendants(pid):
    """The processes a process has started, and theirs."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = {}
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, look = [], [pid]
    while look:
        below = children.get(look.pop(), [])
        found += below
        look += below
    return found


def remaining(pids, seconds=PATIENCE_S):
    """Which of these processes are still there after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [pid for pid in pids if runs(pid)]
        if not left:
            return []
        time.sleep(0.05)
    return left


def runs(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_up_serves_and_leaves_nothing_however_it_ends(models, tmp_path, number):
    if number == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("the kernel's help is Linux only")
    log = tmp_path / "up.log"
    with started("up", "--models", models, "--no-flower", "--gpus", "none", "--json", log=log) as up:
        line = up.stdout.readline()
        assert line, log.read_text()
        document = json.loads(line)
        assert document["flower"] is None
        with Client(document["redis_url"]) as client:
            assert client.submit("double", 21).result(PATIENCE_S) == 42.0
            assert list(client.map("double", range(100))) == [2.0 * number for number in range(100)]
        below = descendants(up.pid)
        assert len(below) >= 3  # Redis, the launcher, a worker
        up.send_signal(number)
        code = up.wait(PATIENCE_S)
        assert remaining(below) == [], log.read_text()
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)


def test_up_says_last_how_to_get_at_it_and_its_flower_knows_the_queues(models, tmp_path):
    log, port = tmp_path / "up.log", free_port()
    with started("up", "--models", models, "--port", port, "--gpus", "none", log=log) as up:
        said = [up.stdout.readline().decode().rstrip("\n") for _ in range(4)]
        assert said[0] == f"# Flower: http://127.0.0.1:{port}", log.read_text()
        url = re.fullmatch(r"export NOGRAD_REDIS_URL='(redis://\S+)'", said[2])[1]
        *words, value, wait = shlex.split(said[3])
        assert (words, value, wait) == (["nograd", "submit", "double"], "JSON", "--wait")
        answer = subprocess.run(
            [NOGRAD, *words[1:], "21", wait, "--redis", url], capture_output=True, text=True, check=True
        )
        assert answer.stdout == "42.0\n"
        until(lambda: "nograd.double" in page(port, "/broker"), log.read_text)
        assert "Inspect method" not in log.read_text()


def page(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.read().decode()


def test_up_ends_when_one_of_its_processes_does(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fleet, "worker_command", lambda *_: ["sleep", "60"])
    monkeypatch.setattr(fleet.Fleet, "wait_ready", lambda one: os.kill(one._children[0].pid, signal.SIGKILL))
    assert cli.run(["up", "--models", str(models), "--no-flower"]) == 1
    assert "redis ended with -9; stopping the others" in capsys.readouterr().err


def test_a_given_redis_is_used_instead_of_a_private_one(models, monkeypatch, redis_url, tmp_path):
    monkeypatch.setattr(fleet, "worker_command", lambda *_: ["sleep", "60"])
    monkeypatch.setattr(fleet, "EmbeddedRedis", lambda *_: pytest.fail("a server was started"))
    with fleet.Fleet(models, redis_url=redis_url, flower_port=None) as given:
        assert given.url == redis_url
    monkeypatch.setenv("NOGRAD_REDIS_URL", redis_url)
    with fleet.Fleet(models, flower_port=None) as given:
        assert given.url == redis_url
    with pytest.raises(BrokerUnavailable):
        fleet.Fleet(models, redis_url="redis://127.0.0.1:1/0", flower_port=None).start()


def test_a_wrong_model_file_is_told_before_anything_starts(models):
    models.write_text('[double]\nloader = "python"\nclas = "x"\n')
    with pytest.raises(ConfigError, match="clas"):
        fleet.Fleet(models).start()


def test_a_worker_that_refuses_its_models_ends_the_wait_with_its_log(models, tmp_path):
    models.write_text('[double]\nloader = "python"\nclass = "tiny_models:Absent"\n')
    with (
        fleet.Fleet(models, flower_port=None, gpus="none", logs=tmp_path) as broken,
        pytest.raises(ConfigError, match=r"worker ended with 2(.|\n)*Absent"),
    ):
        broken.wait_ready()


def test_worker_starts_the_launcher_with_what_it_was_told(models, monkeypatch):
    seen = {}

    def run(**arguments):
        seen.update(arguments, url=os.environ["NOGRAD_REDIS_URL"])
        return 7

    monkeypatch.setenv("NOGRAD_REDIS_URL", "redis://before/0")
    monkeypatch.setattr("nograd.workers.launcher.run", run)
    words = [
        "worker",
        "--models",
        models,
        "--gpus",
        "0,2",
        "--concurrency",
        9,
        "--redis",
        "redis://given/1",
        "--",
        "-Q",
        "x",
    ]
    assert cli.run(list(map(str, words))) == 7
    assert seen == {
        "models": models,
        "gpus": "0,2",
        "concurrency": 9,
        "celery_args": ("-Q", "x"),
        "only": (),
        "memory_budget": None,
        "url": "redis://given/1",
    }


def test_flower_answers_on_loopback(redis_url, tmp_path):
    port = free_port()
    with started("flower", "--port", port, "--redis", redis_url, "--json", log=tmp_path / "flower.log") as flower:
        assert json.loads(flower.stdout.readline()) == {"flower": f"http://127.0.0.1:{port}"}
        until(lambda: fleet.flower_answers(port), (tmp_path / "flower.log").read_text)
        assert jobs_in_flower(port, timeout_s=0) == 0  # it has seen none
        arguments = subprocess.run(
            ["ps", "-o", "args=", "-p", str(flower.pid)], capture_output=True, text=True, check=True
        )
        assert redis_url not in arguments.stdout
        flower.terminate()
        assert flower.wait(PATIENCE_S) == 0
    assert jobs_in_flower(port, timeout_s=0) == 0


# -- the demo ---------------------------------------------------------------------------------------------------------


def test_the_demo_gets_every_answer_right_and_leaves_nothing(tmp_path):
    log = tmp_path / "demo.log"
    with started("demo", "--json", "--examples", EXAMPLES, "--port", free_port(), log=log) as demo:
        first = demo.stdout.readline()
        below = descendants(demo.pid)
        rest = demo.stdout.read()
        assert demo.wait(PATIENCE_S) == 0, log.read_text()
    lines = [json.loads(line) for line in (first + rest).splitlines()]
    answers, digits = lines[:-1], lines[-1]
    assert {answer["model"] for answer in answers} == {"photos", "gpt2", "regression", "linear", "digits", "lstm"}
    assert all(answer["right"] for answer in answers)
    assert digits["digits"] == 1797
    assert digits["accuracy"] > 0.98
    flower = re.search(r"Flower has seen ([\d,]+) messages succeed: http://127", log.read_text())
    assert flower, log.read_text()
    assert int(flower[1].replace(",", "")) > 0
    assert len(below) >= 4
    assert remaining(below) == []


def test_without_the_examples_the_demo_says_where_it_looked(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Examples(tmp_path)


@pytest.mark.parametrize(
    ("prediction", "expected", "same"),
    [
        ({"label": "a", "score": 0.5001, "top": []}, {"label": "a", "score": 0.5}, True),
        ({"label": "a", "score": 0.6}, {"label": "a", "score": 0.5}, False),
        ({"label": "b", "score": 0.5}, {"label": "a", "score": 0.5}, False),
        ({"text": "x"}, "x", True),
        ("y", "x", False),
        (3, 3, True),
        (4, 3, False),
        (1.00001, [1.0], True),
        ([[1.0, 2.0]], [[1.0, 2.1]], False),
        ([1.0], [1.0, 1.0], False),
        ("x", [1.0], False),
        (None, [1.0], False),
    ],
)
def test_same_means_equal_labels_and_close_numbers(prediction, expected, same):
    assert same_answer(prediction, expected) is same
