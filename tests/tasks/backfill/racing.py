"""Real processes that race and die, for the tests of the commit."""

import builtins
import contextlib
import io
import os
import signal
import sys
import traceback

import pyarrow as pa

from nograd.tasks.backfill.commit import Part, commit
from nograd.tasks.backfill.plan import (
    InputDigest,
    ModelIdentity,
    OutputSpec,
    Plan,
    Selection,
    SourceSpec,
    TableSchema,
)

SCHEMA = TableSchema.of(pa.schema({"id": pa.int64(), "prediction": pa.float64()}))


def plan_of(chunks=3, rows=30, **changed):
    """A plan, for what needs no source."""
    fields = {
        "source": SourceSpec(kind="csv", urls=["/in.csv"], id="id", columns=["x"], join=[], schema=SCHEMA),
        "inputs": InputDigest(files=1, bytes=10, rows=rows, skipped=0, duplicates=0, sha256="0" * 64),
        "selection": Selection(),
        "rows": rows,
        "chunks": chunks,
        "rows_per_chunk": 10,
        "batch_rows": 4,
        "ranges": "1" * 64,
        "model": ModelIdentity(name="mlp", parts={"weights": "aa"}),
        "output": OutputSpec(format="parquet", schema=SCHEMA),
    }
    return Plan(**{**fields, **changed})


def part_of(word, errors=True):
    """A part nobody else makes."""
    return Part(
        data=f"part of {word}".encode() * 100,
        errors=f"errors of {word}\n".encode() if errors else b"",
        rows_ok=9 if errors else 10,
        rows_err=1 if errors else 0,
    )


def commit_as(store, plan, word, chunk=0, **kwargs):
    return commit(store, plan, chunk, part_of(word, **kwargs), started_at=1.0, ended_at=2.0, worker=word)


def forked(work):
    """Run in a child process; its pid. The child ends with 0, or 1 and a traceback."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the parent sees the exit code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_of(pid):
    """How a child ended: an exit code, or the negative number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


#: whatever `LocalStore` asks of the operating system that changes something
CALLS = [(os, "link"), (os, "fsync"), (os, "unlink"), (os, "replace"), (os, "mkdir"), (io, "open")]


@contextlib.contextmanager
def kill_at(moment):
    """Die of SIGKILL at that call to the operating system: even ones before it is made, odd ones after it."""
    count = -1

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            done = function(*args, **kwargs)
            count += 1
            if count == moment:
                if function is builtins.open:
                    done.write(b"torn")  # a file that is there, with the beginning of its content
                    done.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return call

    kept = [(module, name, getattr(module, name)) for module, name in CALLS]
    for module, name, function in kept:
        setattr(module, name, deadly(function))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
