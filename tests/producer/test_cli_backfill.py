"""`nograd backfill …` as programs and people see it: exit codes, JSON on stdout, plain lines where no terminal is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nograd.producer.backfill.status import Status
from nograd.producer.cli.progress import Display, describe, duration, percent, size, span
from nograd.tasks.backfill.progress import Progress
from waiting import PATIENCE_S, until

NOGRAD = Path(sys.executable).with_name("nograd")


def nograd(world, *words, timeout=PATIENCE_S):
    done = subprocess.run(
        [NOGRAD, "backfill", *map(str, words)],
        env={**os.environ, "NOGRAD_REDIS_URL": world.url},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def asked(world, csv, out, *words):
    return nograd(world, "run", "doubler", csv, out, "--id", "k", "--columns", "x", "--chunk-rows", "100", *words)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.csv"
    path.write_text("k,x\n" + "".join(f"id{i},{i}\n" for i in range(300)))
    return path


def test_run_without_failures_is_0_and_shows_plain_lines_where_there_is_no_terminal(backfills, good, tmp_path):
    code, out, err = asked(backfills, good, tmp_path / "out")
    assert code == 0, err
    assert out.startswith(f"300 predictions in {tmp_path / 'out'}/parts, 0 failed rows")
    assert err.splitlines()[-1].startswith("100.0 % · 300 of 300 rows · done")
    assert "\x1b" not in err


def test_failed_rows_are_1_and_errors_shows_why(backfills, csv, tmp_path):
    code, out, _ = asked(backfills, csv, tmp_path / "out", "--json")
    document = json.loads(out)
    assert (code, document["rows_ok"], document["rows_err"], document["done"]) == (1, 989, 11, True)
    code, out, _ = nograd(backfills, "errors", tmp_path / "out", "--json")
    document = json.loads(out)
    assert (code, document["rows"]) == (0, 11)
    assert (document["clusters"][0]["rows"], document["clusters"][0]["message"]) == (10, "… is negative")
    assert "is negative" in nograd(backfills, "errors", tmp_path / "out")[1]


def test_a_retry_is_given_up(backfills, csv, tmp_path):
    asked(backfills, csv, tmp_path / "out")
    code, _, err = nograd(backfills, "retry", tmp_path / "out", "--give-up")
    assert (code, "no retry is under way" in err) == (2, True)
    assert nograd(backfills, "retry", tmp_path / "out", "--give-up", "--only", "x")[0] == 2
    backfills.gate.touch()
    assert nograd(backfills, "retry", tmp_path / "out", "--detach")[0] == 0
    code, out, _ = nograd(backfills, "retry", tmp_path / "out", "--give-up", "--json")
    backfills.gate.unlink()
    document = json.loads(out)
    assert (code, document["state"], document["rows_err"], document["retries"]) == (0, "done", 11, 1)


def test_plan_says_what_it_takes_and_writes_only_into_out(backfills, csv, tmp_path):
    words = ("--id", "k", "--columns", "x", "--json")
    code, out, _ = nograd(backfills, "plan", "doubler", csv, *words)
    assert (code, json.loads(out)["rows"], json.loads(out)["saved"]) == (0, 1000, False)
    code, out, _ = nograd(backfills, "plan", "doubler", csv, tmp_path / "out", "--dry-run", *words)
    assert (code, json.loads(out)["failed"], (tmp_path / "out").exists()) == (0, 11, False)
    code, out, _ = nograd(backfills, "plan", "doubler", csv, tmp_path / "out", *words)
    assert (code, json.loads(out)["saved"], (tmp_path / "out" / "_plan.json").exists()) == (0, True, True)
    _, out, _ = nograd(backfills, "plan", "doubler", csv, "--id", "k")
    assert "1,000 rows" in out
    assert "11 rows of the sample failed" in out


def test_more_failed_rows_than_may_are_3_cancelled_is_4_a_damaged_output_5(backfills, csv, tmp_path):
    code, out, err = asked(backfills, csv, tmp_path / "out", "--error-budget", "3", "--json")
    assert code == 3
    assert json.loads(out)["error"]["code"] == "budget_exceeded"
    assert "of 1,000 rows failed, the error budget is 3; " in err
    assert [line.startswith("nograd: ") for line in err.splitlines()[-2:]] == [False, True]  # the state, then why
    assert nograd(backfills, "resume", tmp_path / "out", "--error-budget", "100%")[0] == 1
    assert nograd(backfills, "verify", tmp_path / "out")[0] == 0
    part = tmp_path / "out" / "parts" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    code, out, _ = nograd(backfills, "verify", tmp_path / "out", "--json")
    assert (code, json.loads(out)["ok"]) == (5, False)
    assert "sha256" in json.loads(out)["problems"][0]


def test_detach_pause_status_resume_cancel(backfills, csv, tmp_path):
    backfills.gate.touch()
    code, out, _ = asked(backfills, csv, tmp_path / "out", "--detach", "--json")
    job = json.loads(out)["id"]
    assert code == 0
    code, out, _ = nograd(backfills, "pause", job, "--json")
    assert (code, json.loads(out)["state"]) == (0, "paused")
    assert "paused" in nograd(backfills, "status", tmp_path / "out")[1]
    assert nograd(backfills, "verify", tmp_path / "out")[0] == 1  # nothing is wrong, and nothing is whole
    backfills.gate.unlink()
    assert nograd(backfills, "resume", tmp_path / "out", "--detach")[0] == 0
    code, out, _ = nograd(backfills, "watch", tmp_path / "out", "--json")
    assert (code, json.loads(out.splitlines()[-1])["state"]) == (0, "done")
    backfills.gate.touch()
    asked(backfills, csv, tmp_path / "other", "--detach")
    code, out, _ = nograd(backfills, "cancel", tmp_path / "other", "--json")
    assert (code, json.loads(out)["state"]) == (0, "cancelled")
    backfills.gate.unlink()


def test_who_follows_a_backfill_that_somebody_cancels_ends_with_4(backfills, csv, tmp_path):
    backfills.gate.touch()
    driver = followed(backfills, csv, tmp_path / "out")
    assert nograd(backfills, "cancel", tmp_path / "out")[0] == 0
    _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 4, err
    backfills.gate.unlink()


def followed(world, csv, out):
    """A `run` in the foreground that has told how far it is."""
    words = ("run", "doubler", csv, out, "--id", "k", "--columns", "x", "--chunk-rows", "100")
    env = {**os.environ, "NOGRAD_REDIS_URL": world.url}
    driver = subprocess.Popen([NOGRAD, "backfill", *words], env=env, stderr=subprocess.PIPE, text=True)
    assert "planning" in driver.stderr.readline()
    assert "0 of 1,000 rows" in driver.stderr.readline()
    return driver


def test_ctrl_c_leaves_it_running_and_says_how_to_come_back(backfills, csv, tmp_path):
    backfills.gate.touch()
    driver = followed(backfills, csv, tmp_path / "out")
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130
    assert f"nograd backfill watch {tmp_path / 'out'}" in err
    backfills.gate.unlink()
    assert nograd(backfills, "watch", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


def interrupted(world, register, *words):
    """What it says when it is interrupted while it waits for a worker's answer, where nobody serves the model."""
    register(world.client, doubler="rows")
    env = {**os.environ, "NOGRAD_REDIS_URL": world.url}
    command = [NOGRAD, "backfill", *map(str, words)]
    driver = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: world.client.broker.waiting(["doubler"])["doubler"])
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert (driver.returncode, out) == (130, "")
    return err.splitlines()


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_ctrl_c_while_it_plans_says_that_nothing_has_begun(empty, register, csv, tmp_path, verb):
    assert interrupted(empty, register, verb, "doubler", csv, tmp_path / "out", "--id", "k", "--columns", "x") == [
        "nograd: planning: reading the inputs, scoring a sample …",
        "nograd: stopped before the backfill had begun; no row was written",
    ]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_a_sample_is_scored_for_nothing_but_an_estimate(empty, register, csv):
    assert interrupted(empty, register, "plan", "doubler", csv) == ["nograd: stopped; nothing was written"]


def test_ctrl_c_before_a_resume_or_a_retry_says_what_stands(backfills, empty, register, csv, tmp_path):
    out = tmp_path / "out"
    assert asked(backfills, csv, out)[0] == 1
    assert interrupted(empty, register, "retry", out) == [
        "nograd: stopped before the retry had begun; nothing has changed"
    ]
    backfills.gate.touch()
    nograd(backfills, "retry", out, "--detach")
    empty.redis.flushall()
    assert interrupted(empty, register, "retry", out) == [
        f"nograd: stopped, but the retry is planned: `nograd backfill retry {out}` goes on with it"
    ]
    empty.redis.flushall()
    assert interrupted(empty, register, "resume", out) == [
        f"nograd: stopped; `nograd backfill status {out}` says whether it goes on already"
    ]
    backfills.gate.unlink()


def test_a_retry_is_offered_only_for_what_it_may_mend(backfills, csv, good, tmp_path):
    assert "`retry` runs them again" in asked(backfills, csv, tmp_path / "out")[1]
    good.write_text(good.read_text().replace("id7,7\n", "id7,x\n"))
    assert asked(backfills, good, tmp_path / "other")[1].endswith(
        " shows why, mended inputs need a new run, into another folder\n"
    )
    good.write_text(good.read_text().replace("id7,x\n", "id7,7\n"))
    code, _, err = nograd(backfills, "verify", tmp_path / "other")
    assert (code, "--no-ids checks the output" in err) == (2, True)
    assert nograd(backfills, "verify", tmp_path / "other", "--no-ids")[0] == 0


def test_what_is_finished_is_neither_paused_nor_cancelled(backfills, good, tmp_path):
    asked(backfills, good, tmp_path / "out")
    for verb in ("pause", "cancel"):
        said = (0, f"{tmp_path / 'out'} is finished already; nothing to {verb}\n", "")
        assert nograd(backfills, verb, tmp_path / "out") == said
    assert json.loads((tmp_path / "out" / "_state.json").read_bytes())["wish"] == "run"
    assert json.loads(nograd(backfills, "status", tmp_path / "out", "--json")[1])["state"] == "done"


def test_a_folder_with_other_files_is_refused_before_a_sample_is_scored(empty, register, csv):
    register(empty.client, doubler="rows")
    code, _, err = asked(empty, csv, csv.parent.parent, "--timeout", "0")
    assert (code, (csv.parent.parent / "_plan").exists()) == (2, False)
    assert "holds no backfill (there: in); name a folder of its own" in err


def test_usage_and_configuration_are_2(backfills, csv, tmp_path):
    assert nograd(backfills, "status", tmp_path / "nothing")[0] == 2
    assert nograd(backfills, "run", "doubler", csv)[0] == 2
    assert asked(backfills, csv, tmp_path / "out", "--error-budget", "lots")[0] == 2
    assert asked(backfills, csv, tmp_path / "out", "--params", "[1]")[0] == 2
    code, out, _ = nograd(backfills, "run", "nobody", csv, tmp_path / "out", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "unknown_model")
    assert nograd(backfills, "status", "0123456789ab-01234567", "--json")[0] == 2


# -- what people read ------------------------------------------------------------------------------------------------


def status(state="running", **changed):
    progress = {
        "job": "j", "rows": 1000, "rows_ok": 500, "rows_err": 0, "chunks": 10, "chunks_done": 5, "bytes": 1,
        "rows_per_s": 10.0, "eta_low_s": 40.0, "eta_high_s": 70.0, "last_commit_at": 1.0, "stalled": False,
        "workers": {}, "deviations": 0,
    }  # fmt: skip
    own = {name: changed.pop(name) for name in ("why", "trouble", "running", "queued") if name in changed}
    return Status(id="i", out="/out", model="m", state=state, progress=Progress(**{**progress, **changed}), **own)


def test_a_line_counts_down_only_while_it_runs():
    assert describe(status(running=2)) == "500 of 1,000 rows · 10 rows/s · 40 s to 1 min 10 s left · 2 chunks running"
    assert describe(status(rows_per_s=None, eta_low_s=None, eta_high_s=None)).endswith("time left not known yet")
    assert describe(status("paused")) == "500 of 1,000 rows · paused"
    assert describe(status("stalled", rows_ok=497, rows_err=3)) == "500 of 1,000 rows · stalled · 3 failed"
    assert describe(status("waiting")) == "500 of 1,000 rows · waiting · no worker has a chunk"
    assert describe(status("stopped", why="no space left")).endswith("stopped · no space left")


def test_trouble_with_redis_stands_on_a_line_of_its_own(capsys):
    with Display(terminal=False) as display:
        display(status("done", rows_ok=1000, chunks_done=10, trouble="Redis at here:1: refused"))
    assert capsys.readouterr().err == "100.0 % · 1,000 of 1,000 rows · done\nRedis at here:1: refused\n"


def test_100_percent_is_said_only_of_all_rows():
    assert percent(status(rows_ok=999)) == "99.9 %"
    assert percent(status(rows=100_000, rows_ok=99_999)) == "99.9 %"
    assert percent(status(rows_ok=1000, chunks_done=10)) == "100.0 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (1500, "25 min"), (4000, "1 h 7 min"), (300_000, "3 d 11 h")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_ranges_and_sizes():
    assert span(3.2, 3.4) == "3 s"
    assert span(3, 9) == "3 s to 9 s"
    assert [size(n) for n in (12, 1500, 25_000, 3.2e9, 5e13)] == ["12 B", "1.5 KB", "25 KB", "3.2 GB", "50.0 TB"]


def test_on_a_terminal_there_is_a_bar(capsys):
    with Display(terminal=True) as display:
        display(status(running=1))
    assert "500 of 1,000 rows" in capsys.readouterr().err
