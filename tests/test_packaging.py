"""What is installed is what stands here, and what the container files name exists."""

import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("tasks", "producer", "workers")


def test_every_package_and_data_file_is_in_the_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("nograd-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".lua"} or path.name == "py.typed":
                assert f"nograd/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests/", "tasks/", "nograd/tests", "examples/"))]


def test_the_base_install_has_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {requirement.split(">")[0].split("[")[0] for requirement in project["dependencies"]}
    assert base == {"celery", "click", "msgpack", "msgspec", "rich"}
    assert set(project["optional-dependencies"]) == {"backfill", "worker", "flower", "dev"}


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_the_compose_file_starts_what_the_command_line_knows(compose):
    from nograd.producer.cli.root import cli

    for name in ("worker", "worker-gpu", "flower"):
        command, *args = compose[name]["command"]
        parsed = cli.commands[command].make_context(command, list(args))
        assert parsed.params


def test_the_compose_file_s_paths_are_those_of_the_image(compose):
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = {word for line in dockerfile.splitlines() if line.startswith("COPY") for word in shlex.split(line)[1:]}
    for name in ("worker", "worker-gpu"):
        model_file = compose[name]["command"][compose[name]["command"].index("--models") + 1]
        inside = Path(model_file).relative_to("/app")
        assert inside.parts[0] in copied
        assert (ROOT / inside).exists()
    for word in copied - {"./"}:
        assert (ROOT / word).exists(), word


def test_redis_in_the_compose_file_keeps_jobs(compose):
    command = " ".join(compose["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    for name in ("worker", "flower"):
        assert compose[name]["depends_on"]["redis"]["condition"] == "service_healthy"
