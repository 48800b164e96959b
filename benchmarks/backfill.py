"""Backfills beside the loops one would write instead: ``python benchmarks/backfill.py --scale 1 --rounds 5``.

=========== ==============================================================================================
``images``  ResNet18 over JPEG files: a raw PyTorch loop, Lightning's ``Trainer.predict``, Celery with a task per
            image, ours with one and two workers
``numbers`` an MLP over Parquet: the raw loop and ours at two sizes; the marginal rate is that of the rows between
            them, and what planning and closing cost is told apart
``text``    texts of very different lengths (log-normal) in equal chunks: batches by length, and batches as they come
``memory``  the driver, Redis and the worker at 1, 10 and 100 times so many rows
=========== ==============================================================================================

The contenders of a section take turns, round by round, on the same files; ratios are paired. Each is a process of its
own, its model loaded and warm when the clock starts. Ours is timed from the plan to the closed output; the plan, which
scores a sample for some seconds, stands beside it. ``--scale 1`` are the sizes that the figures are quoted for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from common import fleet, hosted
from common.peak import peak_mb
from common.stats import paired_ratio

from nograd.producer.embedded import EmbeddedRedis

BENCHMARKS = Path(__file__).parent
#: at scale 1
IMAGES, TEXTS, FEW_ROWS, MANY_ROWS, MEMORY_ROWS = 2000, 4000, 5_000_000, 25_000_000, 100_000
#: rows in one row group of the tables
GROUP = 100_000

Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where it runs.

    Attributes:
        folder: for everything.
        models: the model file.
        url: of Redis.
        scale: of the sizes.
        rounds: how often each contender runs.
    """

    folder: Path
    models: Path
    url: str
    scale: float
    rounds: int

    def sized(self, count: int, least: int) -> int:
        """A size at this scale."""
        return max(least, int(count * self.scale))

    @property
    def env(self) -> dict[str, str]:
        """Of workers."""
        return {"NOGRAD_REDIS_URL": self.url, "NOGRAD_MODELS": str(self.models)}

    def loop(self, what: str, source: Path) -> Figures:
        """One run of a loop of `common.loops`."""
        out = self.folder / "loop.parquet"
        return _told([sys.executable, "-m", "common.loops", what, str(self.models), str(source), str(out)])

    def ours(self, model: str, source: Path, workers: int = 1, **options: Any) -> Figures:
        """One backfill with fresh workers, its driver in a process of its own."""
        out = self.folder / f"out{time.monotonic_ns()}"
        told = [self.url, model, str(source), str(out), options]
        command = [sys.executable, "-m", "common.drive", json.dumps(told)]
        with fleet.workers(workers, self.folder, "-Q", f"nograd.{model}", env=self.env) as started:
            server = redis.Redis.from_url(self.url)
            server.config_resetstat()
            found = _told(command, env=self.env)
            found["worker MB"] = [peak_mb(each.process.pid) for each in started]
            found["redis MB"] = round(server.info("memory")["used_memory_peak"] / 1e6, 1)
        shutil.rmtree(out)
        return found


def _told(command: list[str], env: dict[str, str] | None = None) -> Figures:
    """What a contender prints."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "PYTHONWARNINGS": "ignore", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    told: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def take_turns(rounds: int, contenders: dict[str, Callable[[], Figures]]) -> dict[str, list[Figures]]:
    """Each contender once a round, in turn."""
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in names:
            found[name].append(contenders[name]())
            print(f"  round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr)
    return found


def rate(told: Figures) -> float:
    """Rows a second."""
    return float(told["rows"] / told["seconds"])


def against(runs: dict[str, list[Figures]], baseline: str) -> Figures:
    """Rate, ratio to a baseline round by round, and peak memory of every contender."""
    rates = {name: [rate(each) for each in told] for name, told in runs.items()}
    table: Figures = {}
    for name, told in runs.items():
        ratio = paired_ratio(rates[name], rates[baseline])
        memory = [sum(each.get("worker MB", [])) + each["MB"] for each in told]
        table[name] = {
            "rows/s": round(statistics.median(rates[name]), 1),
            f"of {baseline}": {key: round(value, 3) for key, value in ratio.items()},
            "MB": max(memory),
            **{key: max(each[key] for each in told) for key in ("worker MB", "redis MB") if key in told[0]},
        }
    return table


# -- sections ---------------------------------------------------------------------------------------------------------


def images(bench: Bench) -> Figures:
    folder = bench.folder / "images"
    folder.mkdir()
    for number, data in enumerate(hosted.jpegs(bench.sized(IMAGES, 100))):
        (folder / f"{number:06}.jpg").write_bytes(data)
    runs = take_turns(
        bench.rounds,
        {
            "raw loop": lambda: bench.loop("raw-images", folder),
            "Trainer.predict": lambda: bench.loop("lightning-images", folder),
            "a task per image": lambda: naive(bench, folder),
            "ours, 1 worker": lambda: bench.ours("resnet18", folder),
            "ours, 2 workers": lambda: bench.ours("resnet18", folder, 2),
        },
    )
    return against(runs, "raw loop")


def naive(bench: Bench, folder: Path) -> Figures:
    """Celery with a task per image, and results in Redis."""
    env = {**bench.env, "NAIVE_WEIGHTS": str(bench.models.parent / "resnet18.pth")}
    options: Any = {"app": "common.naive_images", "env": env}
    with fleet.workers(1, bench.folder, "--pool", "solo", **options) as [worker]:
        told = _told([sys.executable, "-m", "common.naive_images", str(folder)], env=env)
        told["worker MB"] = [peak_mb(worker.process.pid)]
    return told


def numbers(bench: Bench) -> Figures:
    sizes = {"few": bench.sized(FEW_ROWS, 4 * GROUP), "many": bench.sized(MANY_ROWS, 20 * GROUP)}
    tables = {name: write_table(bench.folder / f"{name}.parquet", rows) for name, rows in sizes.items()}
    runs = take_turns(
        bench.rounds,
        {
            **{f"raw loop, {name}": lambda name=name: bench.loop("raw-numbers", tables[name]) for name in sizes},
            **{f"ours, {name}": lambda name=name: bench.ours("table", tables[name], id="id") for name in sizes},
        },
    )

    def marginal(who: str) -> list[float]:
        pairs = zip(runs[f"{who}, few"], runs[f"{who}, many"], strict=True)
        return [(b["rows"] - a["rows"]) / (b["seconds"] - a["seconds"]) for a, b in pairs]

    ours, raw = marginal("ours"), marginal("raw loop")
    return {
        **against(runs, "raw loop, many"),
        "marginal": {
            "ours rows/s": round(statistics.median(ours)),
            "raw rows/s": round(statistics.median(raw)),
            "ratio": {key: round(value, 3) for key, value in paired_ratio(ours, raw).items()},
        },
        "fixed s": {
            key: round(statistics.median(each[key] for each in runs["ours, many"]), 2) for key in ("plan s", "close s")
        },
    }


def text(bench: Bench) -> Figures:
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(3.2, 1.0, bench.sized(TEXTS, 2000)), 1, 512).astype(int)
    words = np.array([f"w{n}" for n in range(997)])
    texts = [" ".join(chance.choice(words, length)) for length in lengths]
    path = bench.folder / "texts.parquet"
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
    chunk = len(texts) // 4  # the calibration would cut the slower one's smaller: less to choose from
    runs = take_turns(
        bench.rounds,
        {
            "as they come": lambda: bench.ours("as-they-come", path, id="id", rows_per_chunk=chunk),
            "by length": lambda: bench.ours("bucketed", path, id="id", rows_per_chunk=chunk),
        },
    )
    told = against(runs, "as they come")
    told["words"] = {"mean": round(float(lengths.mean()), 1), "most": int(lengths.max())}
    return told


def memory(bench: Bench) -> Figures:
    found: Figures = {}
    for times in (1, 10, 100):
        rows = bench.sized(MEMORY_ROWS, 10_000) * times
        table = write_table(bench.folder / f"m{times}.parquet", rows)
        told = bench.ours("table", table, id="id")
        found[f"{rows} rows"] = {
            "driver MB": told["MB"],
            **{key: told[key] for key in ("worker MB", "redis MB", "chunks")},
        }
        found[f"{rows} rows"]["Trainer.predict MB"] = bench.loop("lightning-numbers", table)["MB"]
        table.unlink()
        print(f"  {rows} rows: {found[f'{rows} rows']}", file=sys.stderr)
    return found


def write_table(path: Path, rows: int) -> Path:
    """So many rows of 16 floats and an id."""
    chance = np.random.default_rng(0)
    columns = {f"x{k}": chance.standard_normal(GROUP, dtype=np.float32) for k in range(16)}
    writer = None
    for first in range(0, rows, GROUP):
        count = min(GROUP, rows - first)
        table = pa.table(
            {"id": np.arange(first, first + count), **{name: each[:count] for name, each in columns.items()}}
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=GROUP)
    assert writer is not None
    writer.close()
    return path


SECTIONS: dict[str, Callable[[Bench], Figures]] = {each.__name__: each for each in (images, numbers, text, memory)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="backfill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told: Figures = {"scale": options.scale, "rounds": options.rounds, "load at first": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="nograd-bench-") as name, EmbeddedRedis() as server:
        folder = Path(name)
        bench = Bench(folder, hosted.write_models(folder), server.url, options.scale, options.rounds)
        for section in options.sections or SECTIONS:
            print(f"{section}:", file=sys.stderr)
            told[section] = SECTIONS[section](bench)
    told["load in the end"] = os.getloadavg()
    if options.json:
        print(json.dumps(told, indent=1))
        return 0
    for section, figures in told.items():
        print(section, "" if isinstance(figures, dict) else figures)
        for name, each in figures.items() if isinstance(figures, dict) else ():
            print(f"  {name:18}", "  ".join(f"{key}: {value}" for key, value in each.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
