"""The command line as programs and people see it: exit codes, one JSON document or line, one line on stderr."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nograd.producer import Client, cli
from nograd.producer.cli.common import show
from waiting import PATIENCE_S, until

NOGRAD = Path(sys.executable).with_name("nograd")


class Done:
    """What a finished command left."""

    def __init__(self, process):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def document(self):
        return json.loads(self.out)

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


def nograd(*words, url=None, stdin=None, timeout=PATIENCE_S, **env):
    environment = {**os.environ, **({"NOGRAD_REDIS_URL": url} if url else {}), **env}
    return Done(
        subprocess.run(
            [NOGRAD, *map(str, words)],
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    )


# -- submit, result, cancel -------------------------------------------------------------------------------------------


def test_submit_prints_the_id_of_a_job_that_result_can_fetch(served_url):
    submitted = nograd("submit", "total", "[1, 2, 3.5]", "--json", url=served_url)
    assert (submitted.code, submitted.err) == (0, "")
    job = submitted.document
    assert job["model"] == "total"
    done = nograd("result", job["id"], "--wait", "--json", url=served_url)
    assert (done.code, done.document) == (0, {"id": job["id"], "prediction": 6.5})


def test_jobs_can_be_submitted_as_bulk(served_url):
    done = nograd("submit", "echo", "1", "--priority", "bulk", "--wait", "--json", url=served_url)
    assert (done.code, done.document["prediction"]) == (0, 1)
    assert nograd("submit", "echo", "1", "--priority", "urgent", url=served_url).code == 2


def test_submit_and_wait_prints_predictions_in_order(served_url):
    done = nograd("submit", "echo", "1", '"two"', "[3]", "--wait", "--json", url=served_url)
    assert done.code == 0
    assert [(line["input"], line["prediction"]) for line in done.lines] == [("1", 1), ('"two"', "two"), ("[3]", [3])]
    people = nograd("submit", "echo", "1", '"two"', "--wait", url=served_url)
    assert people.out == '1: 1\n"two": two\n'


def test_what_an_input_is_depends_on_the_model(served_url, tmp_path):
    picture = tmp_path / "x.png"
    picture.write_bytes(bytes(100))
    done = nograd("submit", "image", picture, "--wait", "--json", url=served_url)
    assert done.document["prediction"] == {"bytes": 100}
    (tmp_path / "rows.json").write_text("[4, 5]")
    done = nograd("submit", "total", f"@{tmp_path / 'rows.json'}", "--wait", url=served_url)
    assert done.out == "9\n"


def test_inputs_come_from_stdin_one_on_a_line(served_url):
    done = nograd("submit", "total", "-", "--wait", "--json", url=served_url, stdin="[1]\n\n[2, 3]\n")
    assert [line["prediction"] for line in done.lines] == [1, 5]


def test_parameters_are_a_json_object(served_url):
    done = nograd("submit", "echo", "1", "--params", '{"k": 2}', "--wait", "--json", url=served_url)
    assert done.document["prediction"] == {"echo": 1, "params": {"k": 2}}
    assert nograd("submit", "echo", "1", "--params", "[2]", url=served_url).code == 2


def test_a_failed_job_is_exit_code_1_and_the_others_are_printed(served_url):
    done = nograd("submit", "total", "[1]", '["x"]', "[3]", "--wait", "--json", url=served_url)
    assert done.code == 1
    first, failed, last = done.lines
    assert (first["prediction"], last["prediction"]) == (1, 3)
    assert failed["error"] == {"type": "InvalidInput", "code": "invalid_input", "message": "rows are numbers"}
    assert done.err == 'nograd: ["x"]: rows are numbers\n'


def test_a_job_without_an_outcome_is_exit_code_1(served_url):
    done = nograd("result", "nobody-sent-this", "--json", url=served_url)
    assert done.code == 1
    assert done.document["error"]["code"] == "result_timeout"
    assert done.err.startswith("nograd: no result yet: job nobody-sent-this is PENDING")
    assert done.err.endswith("; --wait waits for it\n")
    waited = nograd("result", "nobody-sent-this", "--timeout", "0.3", url=served_url)
    assert waited.code == 1
    assert waited.err.startswith("nograd: no result after 0.3 s: job nobody-sent-this is PENDING")
    assert "--wait" not in waited.err


def test_a_cancelled_job_is_exit_code_4(served_url, served, busy, revoked):
    job = served.submit("waits", None)
    cancelled = nograd("cancel", job.id, "--json", url=served_url)
    assert (cancelled.code, cancelled.document) == (0, {"id": job.id, "requested": True})
    until(lambda: job.id in revoked())
    assert busy()
    done = nograd("result", job.id, "--wait", "--json", url=served_url)
    assert done.code == 4
    assert done.document["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image", "absent.png"], "absent.png: cannot read the file"),
        (["total", "[1"], "is not JSON"),
        (["total", "32.1, 101.0"], "e.g. '[32.1, 101.0]', quoted for the shell"),
        (["total", "@absent.json"], "absent.json: cannot read the file"),
        (["echo", "1", "--timeout", "soon"], "not a valid float"),
        (["echo"], "Missing argument"),
    ],
)
def test_a_wrong_input_is_exit_code_2_and_nothing_is_sent(served_url, served, words, message):
    done = nograd("submit", *words, "--json", url=served_url)
    assert done.code == 2
    assert message in done.err
    assert message in done.document["error"]["message"]
    assert "Traceback" not in done.err


def test_an_unknown_model_is_exit_code_2_listing_the_known_ones(served_url):
    done = nograd("submit", "ecko", "1", "--json", url=served_url)
    assert (done.code, done.document["error"]["code"]) == (2, "unknown_model")
    assert "Did you mean 'echo'?" in done.err
    assert done.err.count("\n") == 1


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["models"], ["status"], ["submit", "echo", "1"], ["result", "x", "--wait"], ["cancel", "x"]]
)
def test_without_redis_every_command_is_exit_code_2_within_seconds(words):
    done = nograd(*words, "--json", "--redis", "redis://:secret@127.0.0.1:1/0", timeout=PATIENCE_S)
    assert (done.code, done.document["error"]["code"]) == (2, "broker_unavailable")
    assert done.err == (
        "nograd: no Redis at 127.0.0.1:1 (connection refused): start one with `nograd up --models FILE`, "
        "or name another with --redis URL or NOGRAD_REDIS_URL\n"
    )
    assert done.err.count("\n") == 1
    assert "secret" not in done.err + done.out


def test_a_wrong_environment_is_one_line_and_exit_code_2():
    done = nograd("models", "--json", NOGRAD_REDIS_URL="http://localhost")
    assert (done.code, done.document["error"]["code"]) == (2, "config")
    assert done.err.startswith("nograd: NOGRAD_REDIS_URL: ")
    assert "Traceback" not in done.err
    done = nograd("models", NOGRAD_MODELS="absent.toml")
    assert done.code == 2
    assert "absent.toml: cannot read the model file" in done.err


@pytest.mark.parametrize("words", [["worker"], ["up"]])
def test_a_worker_needs_a_model_file(words):
    done = nograd(*words, "--json")
    assert (done.code, done.document["error"]["code"]) == (2, "config")
    assert "--models" in done.err


def test_without_the_worker_extra_the_error_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    (tmp_path / "models.toml").write_text("")
    for words, extra in ((["worker", "--models", "models.toml"], "worker"), (["flower"], "flower")):
        assert cli.run(words) == 2
        assert f"pip install '.[{extra}]' in a checkout" in capsys.readouterr().err


def test_a_usage_error_is_json_for_programs():
    done = nograd("submit", "--json")
    assert (done.code, done.document["error"]["code"]) == (2, "usage")
    assert nograd("nonsense").code == 2
    assert nograd("--help").code == 0


def test_a_reader_that_stops_reading_is_no_error(served_url):
    words = f"'{NOGRAD}' submit echo - --wait | head -1"
    lines = "".join(f"{number}\n" for number in range(3000))
    done = subprocess.run(
        ["sh", "-c", words],
        env={**os.environ, "NOGRAD_REDIS_URL": served_url},
        input=lines,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout == "0: 0\n"
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_a_wait_with_130(served_url, served):
    def asked():
        return served.app.backend.client.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"]

    before = asked()
    words = [NOGRAD, "result", "nobody-sent-this", "--wait"]
    environment = {**os.environ, "NOGRAD_REDIS_URL": served_url}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: asked() > before + 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr.read().strip() == ""


# -- what is there ----------------------------------------------------------------------------------------------------


def test_models_lists_what_workers_registered(served_url):
    done = nograd("models", "--json", url=served_url)
    cards = {card["name"]: card for card in done.document["models"]}
    assert cards["total"]["input"] == "rows"
    assert cards["total"]["queue"] == "nograd.total"
    assert "nograd.total" in nograd("models", url=served_url).out


def test_a_pipe_gets_whole_names(redis_url, tmp_path):
    name = "a_model_whose_name_is_far_longer_than_a_line_of_a_terminal_is_wide_in_the_most_common_case"
    (tmp_path / "m.toml").write_text(f'[{name}]\nloader = "python"\nclass = "nowhere:Model"\n')
    assert f" nograd.{name} " in nograd("models", "--models", tmp_path / "m.toml", url=redis_url).out


def test_status_shows_what_waits_for_models_nobody_has_registered(redis_url, tmp_path):
    (tmp_path / "m.toml").write_text('[unheard]\nloader = "python"\nclass = "nowhere:Model"\n')
    for priority in ("bulk", "interactive"):
        sent = nograd(
            "submit", "unheard", "1", "2", "--priority", priority, "--models", tmp_path / "m.toml", url=redis_url
        )
        assert sent.code == 0, sent.err
    done = nograd("status", "--timeout", "0.2", "--json", url=redis_url)
    assert done.document["models"]["unheard"] == {"waiting": 4}
    assert "unheard" in nograd("status", "--timeout", "0.2", url=redis_url).out


def test_whoever_asks_whether_workers_are_ready_hears_why_not(redis_url):
    done = nograd("status", "--ready", "--timeout", "0.2", url=redis_url)
    assert (done.code, done.out) == (1, "not ready: no worker answers\n")


def test_models_lists_a_model_file_too(redis_url, tmp_path):
    (tmp_path / "m.toml").write_text('[mine]\nloader = "python"\nclass = "nowhere:Model"\n')
    done = nograd("models", "--models", tmp_path / "m.toml", "--json", url=redis_url)
    assert [card["name"] for card in done.document["models"]] == ["mine"]


def test_status_shows_workers_and_queues(served_url, redis_url, register):
    until(lambda: len(nograd("status", "--json", url=served_url).document["workers"]) == 1)
    assert nograd("status", "--json", url=served_url).document["models"]["total"] == {"waiting": 0}
    until(lambda: "1 worker" in nograd("status", url=served_url).out)
    with Client(redis_url) as client:
        register(client, echo="json")
        client.submit_many("echo", [1, 2, 3])
    done = nograd("status", "--timeout", "0.2", "--json", url=redis_url)
    assert (done.document["workers"], done.document["models"]["echo"]) == ([], {"waiting": 3})


def test_every_command_speaks_json():
    from nograd.producer.cli.root import cli as group

    commands = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        commands |= {name: command} if inner is None else {f"{name} {one}": each for one, each in inner.items()}
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--redis", "--models"} <= options, name
        assert command.help, name


@pytest.mark.parametrize(
    ("prediction", "text"),
    [
        ({"label": "cat", "score": 0.98765, "top": []}, "cat (0.988)"),
        ({"text": "once\nupon"}, "once\nupon"),
        ("plain", "plain"),
        ([1.5, 2], "[1.5,2]"),
        (None, "null"),
        ({"label": 1}, '{"label":1}'),
    ],
)
def test_people_see_predictions_on_their_terms(prediction, text):
    assert show(prediction) == text
