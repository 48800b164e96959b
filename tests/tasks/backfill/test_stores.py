"""What every store promises, on every kind; and which object stores are refused."""

import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nograd.tasks.backfill.plan import check_vacant
from nograd.tasks.backfill.sources import survey
from nograd.tasks.backfill.store import open_store
from nograd.tasks.errors import OutputError, SourceError
from object_store import environment


class Conditional(MemoryFileSystem):
    """Memory that decides a conditional put in one step, as an object store does."""

    protocol = "conditional"
    store = {}  # noqa: RUF012 - as in its base: one for all
    pseudo_dirs = [""]  # noqa: RUF012
    lock = threading.Lock()
    lose_answers = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        with self.lock:
            if self.lose_answers and mode == "create":
                super().pipe_file(path, value, mode)  # done; the answer is lost, and the client asks again
            super().pipe_file(path, value, mode)


class Careless(Conditional):
    """It does not know of modes."""

    protocol = "careless"

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, "overwrite")


class Plain(fsspec.AbstractFileSystem):
    """It has what every file system of fsspec has, and no more."""

    protocol = "plain"


@pytest.fixture(params=["local", "conditional", "s3"])
def store(request, tmp_path):
    fsspec.register_implementation("conditional", Conditional, clobber=True)
    fsspec.register_implementation("careless", Careless, clobber=True)
    fsspec.register_implementation("plain", Plain, clobber=True)
    Conditional.store.clear()
    if request.param == "s3":
        request.getfixturevalue("object_store")
        return open_store(f"s3://data/{tmp_path.name}")
    return open_store(tmp_path / "out" if request.param == "local" else "conditional://bucket/out")


def test_a_name_is_taken_once(store):
    assert store.create("_commits/a", b"first")
    assert not store.create("_commits/a", b"second")
    assert store.read("_commits/a") == b"first"
    assert store.names("_commits") == ["a"]
    assert store.names("_staging") == []


def test_of_many_threads_one_takes_the_name(store):
    barrier = threading.Barrier(16)
    won = []

    def race(number):
        barrier.wait()
        if store.create("x", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("x") == str(won[0]).encode()
    assert len(won) == 1


def test_settling_again_and_again_is_settling_once(store):
    staged = store.stage(b"content")
    for _ in range(3):
        store.settle(staged, "parts/a", 7)
        assert store.read("parts/a") == b"content"
    assert store.names("_staging") == []
    with pytest.raises(OutputError, match="parts/b is gone, and what it was made from"):
        store.settle(staged, "parts/b", 7)


def test_what_is_not_there_is_told(store):
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.open("nothing")
    assert store.size("nothing") is None
    assert store.names("nothing") == []
    store.remove("nothing")
    store.replace("_X", b"1")
    store.replace("_X", b"22")
    assert store.size("_X") == 2
    with store.open("_X") as file:
        assert file.read(1) == b"2"


def test_entries_are_what_stands_at_the_top(store):
    assert store.entries() == []
    store.create("_commits/a", b"x")
    store.create("b", b"x")
    assert [name for name in store.entries() if name != "_staging"] == ["_commits", "b"]


def test_a_backfill_is_not_begun_among_other_files(store):
    check_vacant(store)
    for name in ("_plan/inputs-0123.parquet", "_staging/0123", ".DS_Store"):  # a planning was interrupted
        store.create(name, b"x")
    check_vacant(store)
    for name in ("parts/a", "notes.txt"):
        store.create(name, b"x")
    with pytest.raises(OutputError, match=r"is not empty and holds no backfill \(there: notes.txt, parts\); name a"):
        check_vacant(store)
    store.create("_plan.json", b"x")
    check_vacant(store)


def test_a_probe_leaves_nothing(store):
    assert store.probe() in {"link", "put"}
    assert store.names("_staging") == []


def test_a_lost_answer_is_no_lost_race(store, monkeypatch):
    monkeypatch.setattr(Conditional, "lose_answers", True)
    remote = open_store("conditional://bucket/other")
    assert remote.create("a", b"mine")
    assert not remote.create("a", b"another's")


def test_an_object_store_that_cannot_create_exclusively_is_refused(store):
    with pytest.raises(OutputError, match="creating an object a second time did not fail as it must"):
        open_store("careless://bucket/out").probe()
    with pytest.raises(OutputError, match="Plain has no conditional put"):
        open_store("plain://bucket/out").probe()
    with pytest.raises(OutputError, match="cannot write to nosuch://x"):
        open_store("nosuch://x")


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=f"{tmp_path}/file/out"):
        open_store(tmp_path / "file" / "out").probe()


@pytest.mark.parametrize("bucket", ["terse", "busy"])
def test_a_store_may_say_in_its_own_way_that_a_name_is_taken(object_store, bucket):
    store = open_store(f"s3://{bucket}/out")
    assert store.probe() == "put"
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


@pytest.mark.parametrize(
    ("bucket", "told"),
    [
        ("careless", r"cannot hold a backfill \(creating an object a second time .*\): .* name a store that has them"),
        ("lacking", r"cannot hold a backfill \(A header .*not implemented\): .* name a store that has them"),
        ("nosuch", "The specified bucket does not exist; make it first"),
        ("private", "The AWS Access Key Id you provided does not exist"),
    ],
)
def test_a_bucket_that_cannot_hold_a_backfill_is_refused_by_name_and_cause(object_store, bucket, told):
    with pytest.raises(OutputError, match=f"s3://{bucket}/out.*{told}"):
        open_store(f"s3://{bucket}/out").probe()


def test_what_is_too_large_for_one_request_does_not_take_a_name_either(object_store, tmp_path):
    store = open_store(f"s3://data/{tmp_path.name}")
    assert store.create("a", b"first")
    assert not store.create("a", bytes(101 << 20))
    assert store.read("a") == b"first"


def test_without_credentials_nothing_is_read_or_written_and_it_is_said_why(object_store):
    with environment({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}):
        with pytest.raises(OutputError, match=r"s3://data/out.*: Unable to locate credentials"):
            open_store("s3://data/out").read("_plan.json")
        with pytest.raises(SourceError, match=r"s3://data/in: cannot be listed: Unable to locate credentials"):
            survey("s3://data/in")


def test_inputs_that_are_not_there_or_not_ours_are_told(object_store):
    with pytest.raises(SourceError, match="s3://nosuch/in: no such file or folder"):
        survey("s3://nosuch/in")
    with pytest.raises(SourceError, match="s3://private/in: cannot be listed: "):
        survey("s3://private/in")
