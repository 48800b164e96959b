"""The laws of the commit, with real processes: racing, killed at every call, without links, without room."""

import contextlib
import hashlib
import os
import platform
import signal
import subprocess

import pytest

from nograd.tasks.backfill.commit import committed_chunks, find_record, records, settle_all, settled, sweep
from nograd.tasks.backfill.store import open_store
from nograd.tasks.errors import BackfillError, OutputError, OutputFull
from racing import commit_as, exit_of, forked, kill_at, part_of, plan_of
from refusals import LINKS, RENAMEAT2, refuse

PLAN = plan_of()


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "out")


def files(store):
    """Everything in the folder but what is staged."""
    return {
        path.relative_to(store.root).as_posix(): path.read_bytes()
        for path in sorted(store.root.rglob("*"))
        if path.is_file() and path.parent.name != "_staging"
    }


def whole(store, chunk=0):
    """Check that a chunk is committed, that what stands there is of one attempt, and whose."""
    record = find_record(store, PLAN, chunk)
    for file in (record.part, record.errors):
        assert hashlib.sha256(store.read(file.name)).hexdigest() == file.sha256
    part = part_of(record.worker)
    assert store.read(record.part.name) == part.data
    assert store.read(record.errors.name) == part.errors
    return record.worker


def test_a_commit_leaves_the_part_its_errors_and_the_record_and_nothing_staged(store):
    assert commit_as(store, PLAN, "one").won
    assert set(files(store)) == {"_commits/000000.json", "errors/part-000000.jsonl", "parts/part-000000.parquet"}
    assert store.names("_staging") == []
    assert whole(store) == "one"


def test_the_first_commit_wins_and_a_late_one_changes_no_byte(store):
    commit_as(store, PLAN, "first")
    before = files(store)
    late = commit_as(store, PLAN, "late")
    assert not late.won
    assert late.record.worker == "first"
    assert files(store) == before
    assert store.names("_staging") == []


@pytest.mark.parametrize("links", [True, False])
def test_of_twenty_racing_processes_one_wins_and_all_know_it(store, links):
    ready, start = os.pipe()
    reports, report = os.pipe()

    def race(word):
        if not links:
            refuse(*LINKS[platform.machine()])
        os.read(ready, 1)  # all begin when the other end is closed
        done = commit_as(store, PLAN, word)
        os.write(report, f"{word} {done.won} {done.record.worker}\n".encode())

    def child(word):
        os.close(start)
        race(word)

    pids = [forked(lambda word=f"racer{n}": child(word)) for n in range(20)]
    os.close(start)
    assert [exit_of(pid) for pid in pids] == [0] * 20
    os.close(report)
    with os.fdopen(reports) as lines:
        told = [line.split() for line in lines]
    winner = whole(store)
    assert [word for word, won, _ in told if won == "True"] == [winner]
    assert {seen for _, _, seen in told} == {winner}
    assert store.names("_staging") == []
    assert len(store.names("parts")) == len(store.names("errors")) == 1


@pytest.mark.parametrize("next_look", ["attempt", "settle_all"])
def test_killed_at_any_call_to_the_system_the_next_look_finds_all_or_nothing(tmp_path, next_look):
    decided = []
    for moment in range(1000):
        store = open_store(tmp_path / f"out{moment}")

        def attempt(store=store, moment=moment):
            with kill_at(moment):
                commit_as(store, PLAN, "victim")

        code = exit_of(forked(attempt))
        # At any moment, what readers see is of a committed chunk, whole.
        done = committed_chunks(store) == [0]
        decided.append(done)
        for name in files(store):
            if name.startswith(("parts/", "errors/")):
                assert done
                assert store.read(name) in {part_of("victim").data, part_of("victim").errors}
        if next_look == "settle_all":
            settle_all(store, PLAN)
            if done:
                assert whole(store) == "victim"
        assert commit_as(store, PLAN, "next").won is not done
        assert whole(store) == ("victim" if done else "next")
        sweep(store)
        assert store.names("_staging") == []
        assert whole(store)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    # It was killed on both sides of the decision, and the decision is one moment.
    assert decided == sorted(decided)
    assert decided.count(False) > 10
    assert decided.count(True) > 10


def test_one_that_slept_through_its_replacement_loses_and_harms_nothing(store):
    """SIGSTOP before the record, another attempt commits and all is closed, SIGCONT."""
    told, tell = os.pipe()

    def sleeper():
        create = type(store).create

        def slow(self, name, data):
            os.write(tell, b".")
            os.kill(os.getpid(), signal.SIGSTOP)
            return create(self, name, data)

        type(store).create = slow
        assert not commit_as(store, PLAN, "sleeper").won

    pid = forked(sleeper)
    os.read(told, 1)
    os.waitpid(pid, os.WUNTRACED)
    assert commit_as(store, PLAN, "other").won
    sweep(store)
    before = files(store)
    os.kill(pid, signal.SIGCONT)
    assert exit_of(pid) == 0
    assert files(store) == before
    assert whole(store) == "other"
    assert store.names("_staging") == []


def test_a_folder_without_hard_links_is_committed_to_by_renames(store):
    def work():
        refuse(*LINKS[platform.machine()])
        with pytest.raises(PermissionError):
            os.link(__file__, store.root / "link")
        assert store.probe() == "rename"
        assert commit_as(store, PLAN, "one").won
        assert not commit_as(store, PLAN, "two").won
        assert whole(store) == "one"

    assert store.probe() == "link"
    assert exit_of(forked(work)) == 0


def test_a_folder_that_can_neither_link_nor_rename_is_refused_by_name(store):
    def work():
        machine = platform.machine()
        refuse(*LINKS[machine], *RENAMEAT2[machine])
        with pytest.raises(OutputError, match=f"{store.url} cannot hold a backfill: it has neither hard links"):
            store.probe()
        with pytest.raises(OutputError, match="neither hard links"):
            commit_as(store, PLAN, "one")
        assert committed_chunks(store) == []
        assert list(files(store)) == []

    assert exit_of(forked(work)) == 0


def test_on_a_full_disk_nothing_is_committed_and_after_making_room_everything_is(small_disk):
    store = open_store(small_disk / "out")
    commit_as(store, PLAN, "before", chunk=1)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    with pytest.raises(OutputFull, match="No space left"):
        commit_as(store, PLAN, "full")
    assert committed_chunks(store) == [1]
    assert store.names("_staging") == []
    assert whole(store, 1) == "before"
    filler.unlink()
    assert commit_as(store, PLAN, "after").won
    assert whole(store) == "after"


def test_a_disk_that_fills_up_at_any_point_of_a_commit_loses_nothing(small_disk):
    """So many bytes free, then one page more, and so on: the first that suffices commits."""
    page = os.statvfs(small_disk).f_bsize
    seen = set()
    for free in range(20):
        store = open_store(small_disk / f"out{free}")
        filler = small_disk / "filler"
        room = os.statvfs(small_disk).f_bavail - free
        filler.write_bytes(bytes(room * page))
        try:
            seen.add(commit_as(store, PLAN, "one").won)
        except OutputFull:
            seen.add("full")
        filler.unlink()
        commit_as(store, PLAN, "two")
        assert whole(store) in {"one", "two"}
        assert store.names("_staging") == []
        subprocess.run(["rm", "-r", small_disk / f"out{free}"], check=True)
    assert seen == {"full", True}


def test_a_record_of_another_plan_is_refused(store):
    commit_as(store, PLAN, "one")
    with pytest.raises(BackfillError, match=f"belongs to plan {PLAN.job}"):
        settled(store, plan_of(rows=31), 0)


def test_a_foreign_file_under_the_name_of_a_part_does_not_survive_the_commit(store):
    (store.root / "parts").mkdir(parents=True)
    (store.root / "parts" / "part-000000.parquet").write_bytes(b"somebody's")
    commit_as(store, PLAN, "one")
    assert whole(store) == "one"


def test_records_come_in_the_order_of_the_chunks(store):
    for chunk in (2, 0, 1):
        commit_as(store, PLAN, f"w{chunk}", chunk=chunk)
    assert [record.chunk for record in records(store, PLAN)] == [0, 1, 2]
    assert [record.chunk for record in records(store, PLAN, known={0, 1})] == [2]


def test_what_is_swept_away_under_its_writer_is_written_again(store, monkeypatch):
    """Somebody closes one backfill of the folder while another, a retry, writes a record."""
    take, swept = type(store)._take, []

    def swept_first(self, staged, path):
        if not swept:
            swept.append(sweep(store))
        return take(self, staged, path)

    monkeypatch.setattr(type(store), "_take", swept_first)
    assert store.create("_commits/x", b"record")
    assert swept == [1]
    assert store.read("_commits/x") == b"record"
    assert store.names("_staging") == []
