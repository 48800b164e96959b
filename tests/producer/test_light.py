"""A web server needs the base install alone: no torch, no numpy, and none of either in `sys.modules`."""

import os
import subprocess
import sys

HEAVY = ("torch", "numpy", "PIL", "torchvision", "transformers", "lightning", "sklearn")

SUBMIT = f"""
import sys
for name in {HEAVY!r}: sys.modules[name] = None  # importing it raises ImportError
from nograd.producer import Client
with Client() as client:
    job = client.submit("total", [1, 2])
    assert job.result(180) == 3
    assert [j.result(180) for j in client.submit_many("echo", [1, "a", None])] == [1, "a", None]
    assert list(client.map("image", [b"abc"])) == [{{"bytes": 3}}]
    assert "total" in client.models()
"""


def python(code, url):
    env = {**os.environ, "NOGRAD_REDIS_URL": url}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=180, check=False
    )


def test_jobs_go_and_come_back_where_torch_and_numpy_cannot_be_imported(served_url):
    done = python(SUBMIT, served_url)
    assert done.returncode == 0, done.stderr


def test_neither_is_imported_where_they_are_installed(served_url):
    code = SUBMIT.replace(f"for name in {HEAVY!r}: sys.modules[name] = None", "") + (
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = python(code, served_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_these():
    import nograd.producer

    assert nograd.producer.__all__ == ["Client", "Job"]
    assert {name: getattr(nograd.producer, name).__module__ for name in nograd.producer.__all__} == {
        "Client": "nograd.producer.client",
        "Job": "nograd.producer.job",
    }
