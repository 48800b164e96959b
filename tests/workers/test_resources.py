import os
import subprocess
import sys

import pytest

from nograd.tasks.errors import ConfigError
from nograd.workers import resources
from nograd.workers.resources import Resources, read_size, share_of_cores, show_size, usable_cores


def test_nothing_set_means_all_cores_and_the_device_s_own_limits():
    assert Resources.from_env({}) == Resources(usable_cores(), usable_cores(), None, None)


def test_what_is_set_is_read():
    env = {"NOGRAD_THREADS": "3", "NOGRAD_MEMORY_BUDGET": "2GB", "NOGRAD_TF32": "0"}
    assert Resources.from_env(env) == Resources(3, 3, memory_budget=2_000_000_000, tf32=False)
    assert Resources.from_env({"NOGRAD_TF32": "1"}).tf32 is True
    assert Resources.from_env({"NOGRAD_THREADS": "3", "OMP_NUM_THREADS": "2,1"}) == Resources(3, 2)
    assert Resources.from_env({"NOGRAD_THREADS": "3", "OMP_NUM_THREADS": "some"}) == Resources(3, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NOGRAD_THREADS", "0"),
        ("NOGRAD_THREADS", "-2"),
        ("NOGRAD_THREADS", "two"),
        ("NOGRAD_MEMORY_BUDGET", "0"),
        ("NOGRAD_MEMORY_BUDGET", "10 gallons"),
        ("NOGRAD_MEMORY_BUDGET", "GB"),
        ("NOGRAD_MEMORY_BUDGET", "2T"),  # a unit is written whole
        ("NOGRAD_TF32", "yes"),
    ],
)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name} has value '{value}'"):
        Resources.from_env({name: value})


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("10GB", 10**10), ("1.5 GiB", 3 * 2**29), ("512mib", 2**29), ("7kb", 7000)],
)
def test_sizes(text, size):
    assert read_size(text, "--memory-budget") == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1.25e9, "1.2 GB"), (3e13, "30.0 TB")]
)
def test_sizes_for_people(size, text):
    assert show_size(size) == text


@pytest.mark.parametrize(("cores", "workers", "share"), [(16, 4, "4"), (16, 5, "3"), (2, 8, "1"), (7, 1, "7")])
def test_workers_share_the_cores(monkeypatch, cores, workers, share):
    monkeypatch.setattr(resources, "usable_cores", lambda: cores)
    assert share_of_cores(workers, {}) == {"NOGRAD_THREADS": share, "OMP_NUM_THREADS": share}


def test_what_the_user_has_set_is_left(monkeypatch):
    monkeypatch.setattr(resources, "usable_cores", lambda: 16)
    assert share_of_cores(4, {"OMP_NUM_THREADS": "2,1"}) == {"NOGRAD_THREADS": "4", "OMP_NUM_THREADS": "2,1"}
    assert share_of_cores(4, {"NOGRAD_THREADS": "9"}) == {"NOGRAD_THREADS": "9", "OMP_NUM_THREADS": "9"}


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_torch_sleep_between_operators_unless_told_otherwise(given, found):
    """OpenMP says itself what it read when it was loaded."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", "import nograd.workers.pool"]
    done = subprocess.run(
        command, env={**env, "OMP_DISPLAY_ENV": "TRUE", **given}, capture_output=True, text=True, check=True
    )
    assert f"OMP_WAIT_POLICY = '{found}'" in done.stdout + done.stderr
