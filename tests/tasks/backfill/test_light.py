"""The base install plans no backfill, and says what is missing."""

import subprocess
import sys

import pytest

CODE = """
import sys
sys.modules[{name!r}] = None  # importing it raises ImportError
from nograd.tasks.errors import ConfigError, MissingExtra
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
try:
    survey({source!r})
    open_store("memory://x")
except MissingExtra as err:
    assert isinstance(err, ConfigError)
    print(err.message)
"""


@pytest.mark.parametrize("name", ["pyarrow", "numpy", "fsspec"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, name):
    (tmp_path / "in.csv").write_text("x\n1\n")
    code = CODE.format(name=name, source=str(tmp_path / "in.csv"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"a backfill needs {name}: pip install '.[backfill]'")


REMOTE = """
import sys
sys.modules["s3fs"] = None
from nograd.tasks.errors import NogradError
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
for look in (survey, open_store):
    try:
        look("s3://bucket/x")
    except NogradError as err:
        print(err.message)
"""


def test_the_library_of_a_store_that_is_not_installed_is_named():
    done = subprocess.run([sys.executable, "-c", REMOTE], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "s3://bucket/x: Install s3fs to access S3",
        "cannot write to s3://bucket/x: Install s3fs to access S3",
    ], done.stderr
