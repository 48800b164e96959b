"""One backfill, by its output folder: plan, start, follow, pause, resume, cancel, look, verify, retry what failed.

Laws:

* Storage is the truth: any number of processes may hold a `Backfill` of one folder, on any machine, and see the same.
* Workers keep it going by themselves. Whoever follows it may go, and come back.
* Failed rows can be run again, as often as it takes: what else is said and done here takes the retries into account.
* Nothing goes on under other inputs, another model or other parameters: `PlanChanged` says what changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from nograd.tasks.backfill import commit, fingerprint, layout, state
from nograd.tasks.backfill import plan as plans
from nograd.tasks.backfill.budget import OVER_BUDGET, allowed_failures, parse_budget
from nograd.tasks.backfill.failures import Cluster, clusters, failures
from nograd.tasks.backfill.finalize import finalize
from nograd.tasks.backfill.plan import Job, Plan
from nograd.tasks.backfill.progress import Progress
from nograd.tasks.backfill.pump import Pumped, pump
from nograd.tasks.backfill.retry import draft_retry, give_up, remaining, rows_of
from nograd.tasks.backfill.store import open_store
from nograd.tasks.backfill.store_remote import RemoteStore
from nograd.tasks.backfill.store_retry import RetryStore
from nograd.tasks.backfill.task import hints_of, send_chunk
from nograd.tasks.backfill.verify import Report, verify_all
from nograd.tasks.backfill.watchlist import Watchlist
from nograd.tasks.backfill.window import SENDING_S, Wish
from nograd.tasks.errors import (
    BackfillCancelled,
    BackfillError,
    BrokerUnavailable,
    BudgetExceeded,
    ConfigError,
    PlanChanged,
)

from . import planning
from .planning import TIMEOUT_S, Estimate, Request
from .stages import Stage, Stages
from .status import StateName, Status

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from nograd.producer.client import Client
    from nograd.tasks.backfill.store import Store

#: seconds between two looks of whoever follows
INTERVAL_S = 2.0


class Backfill:
    """One backfill. Made by `Client.backfill` and `Client.backfill_at`; one thread at a time.

    Args:
        client: sends the chunks.
        out: the output folder, a path or URL.
        request: what is to be scored; None for what is planned there.
        error_budget: see `nograd.tasks.backfill.budget`; None for that of the last start.

    Raises:
        ConfigError: if the budget is none, or the folder is said to be a retry's.
        OutputError: if the URL's protocol is not known.
    """

    def __init__(
        self,
        client: Client,
        out: str | Path,
        request: Request | None = None,
        *,
        error_budget: str | float | None = None,
    ) -> None:
        self._client = client
        self._request = request
        self._budget_given = error_budget is not None
        self._budget = parse_budget(error_budget)
        self._store = open_store(out)
        if isinstance(self._store, RetryStore):
            raise ConfigError(f"{out} is a retry; name the output folder alone")

    @property
    def out(self) -> str:
        """The output folder."""
        return self._store.url

    @cached_property
    def job(self) -> Job:
        """The plan.

        Raises:
            BackfillError: if there is none, or it cannot be read.
        """
        return plans.load(self._store)

    @property
    def planned(self) -> bool:
        """Whether the folder holds a plan.

        Raises:
            BackfillError: if it cannot be read.
        """
        return plans.find(self._store) is not None

    @property
    def id(self) -> str:
        """Names it, together with its folder."""
        return hints_of(self.job)

    # -- before it runs ----------------------------------------------------------------------------------------------

    def plan(self, *, save: bool = True, timeout_s: float = TIMEOUT_S) -> Estimate:
        """Have a sample scored, and plan.

        Args:
            save: write the plan; else this is a dry run that leaves nothing behind.
            timeout_s: to wait for a worker's answer.

        Raises:
            PlanChanged: if the folder holds another plan.
            OutputError: if it holds something else.
            BackfillError: and others, see `planning.prepare`.
        """
        request = self._asked()
        planned = plans.find(self._store)
        if planned is not None:  # its chunks are cut as they are
            self._check_request(planned, request)
            request = dataclasses.replace(request, rows_per_chunk=planned.plan.rows_per_chunk)
        else:
            plans.check_vacant(self._store)  # before a sample is scored
            if save and isinstance(self._store, RemoteStore):
                self._store.probe()  # likewise; there is no folder that a refusal would leave
        prepared = planning.prepare(self._client, request, self.out, timeout_s)
        if planned is not None:
            fingerprint.check(planned, model=prepared.draft.plan.model)
        elif save:
            plans.save(self._store, prepared.draft)
            with self._client.broker.errors():
                self._stages.last().window.clear()  # a folder that was deleted may have left some
        return prepared.estimate

    # -- making it run -----------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = TIMEOUT_S) -> None:
        """Plan, unless that is done, and send the first chunks; returns at once, the workers go on.

        A folder that holds a plan of the same inputs, model and parameters is resumed.

        Raises:
            PlanChanged: if it holds another, saying in what they differ.
            BackfillError: and others, see `planning.prepare`.
            BrokerUnavailable: if Redis does not answer.
        """
        planned = plans.find(self._store)
        if planned is None:
            self.plan(timeout_s=timeout_s)
            self._go()
            return
        if self._request is not None:
            self._check_request(planned, self._request)
        self.resume(timeout_s)

    def resume(self, timeout_s: float = TIMEOUT_S) -> None:
        """Go on with what is planned, or with the retry that is not finished, whatever stopped it; returns at once.

        Raises:
            PlanChanged: if inputs, model or parameters are not those of the plan; it lists what changed.
            BackfillError: if there is no plan, or no worker answers in time.
            BrokerUnavailable: if Redis does not answer.
        """
        stage = self._stages.last()
        job = stage.job
        if stage.closed:
            if self._budget_given:
                self._set(error_budget=self._budget)
            return
        try:
            fingerprint.check(job)  # before anybody is waited for
            if len(commit.committed_chunks(job.store)) < job.plan.chunks:
                fingerprint.check(job, model=self._model_now(timeout_s))
        except PlanChanged as err:
            if isinstance(job.store, RetryStore):
                way_out = f"put that back, or `nograd backfill retry {self.out} --give-up` ends this retry as it stands"
                raise PlanChanged(f"{err.message}; {way_out}") from err
            raise
        commit.settle_all(job.store, job.plan)
        self._go()

    def retry(self, only: Collection[str] = (), *, timeout_s: float = TIMEOUT_S) -> Plan | None:
        """Run failed rows again; returns at once, as `resume`. A retry that is not finished is gone on with.

        The model may be another than before, if that is the cure: the retry's plan and the metadata of its parts say
        which it was. The error budget is not looked at before the end.

        Args:
            only: types of errors; all if empty.
            timeout_s: to wait for a worker's answer.

        Returns:
            What is run; None if no row is left that failed.

        Raises:
            NotFinished: if the backfill is not finished.
            PlanChanged: if inputs have changed, or a retry of other rows is not finished.
            BackfillError: if no row that failed has such an error, naming those there are; or no worker answers.
            BrokerUnavailable: if Redis does not answer.
        """
        *before, last = self._stages.look()
        if before and not last.closed:
            self._check_retry(last.job, only, len(before) - 1)
            self.resume(timeout_s)
            return last.job.plan
        if not last.closed:
            finalize(self.job)
        left = remaining(self.job)
        if not left:
            return None
        kinds = {why.type for why in left.values()}
        if only and not kinds & set(only):
            raise BackfillError(
                f"{self.out}: no row failed with {' or '.join(only)}; there are {', '.join(sorted(kinds))}"
            )
        fingerprint.check(self.job)  # before anybody is waited for
        store, draft = draft_retry(
            self.job,
            rows_per_chunk=self.job.plan.rows_per_chunk,
            model=self._model_now(timeout_s),
            which=lambda why: not only or why.type in only,
        )
        plan = plans.save(store, draft).plan
        self._go()
        return plan

    def give_up_retry(self) -> int:
        """End a retry that cannot or shall not go on: the rows it has not run failed as they had before.

        What it has committed stays, and `retry` may run the others again, with the model as it is then.

        Returns:
            Rows it has not run.

        Raises:
            BackfillError: if no retry is under way.
            OutputError: if the folder cannot be written.
        """
        stage = self._stages.last()
        with self._cancelled(stage) if isinstance(stage.job.store, RetryStore) else contextlib.nullcontext():
            return give_up(self.job)

    def run(
        self,
        each: Callable[[Status], None] | None = None,
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
    ) -> Status:
        """Start or resume, and stay to the end.

        Killing the process, or Ctrl-C, ends only this: the workers go on. `Client.backfill_at` finds it again.

        Args:
            each: called with what there is to tell, every ``interval_s`` seconds and at the end.
            interval_s: seconds.
            timeout_s: to wait for a worker's answer before it begins.

        Returns:
            The last status; failed rows are in its ``progress.rows_err``.

        Raises:
            BudgetExceeded: if more rows failed than may.
            BackfillCancelled: if somebody cancelled it.
            BackfillError: if a worker stopped it, saying why; and whatever `start` raises.
            BrokerUnavailable: if Redis does not answer at the start. Later it may be away.
        """
        self.start(timeout_s)
        return self.follow(each, interval_s=interval_s)

    def follow(self, each: Callable[[Status], None] | None = None, *, interval_s: float = INTERVAL_S) -> Status:
        """Stay to the end with what is under way, and keep it going: chunks that were lost are sent again.

        A pause is waited for. Arguments, result and errors as of `run`.
        """
        while True:
            now = self._turn()
            if each is not None:
                each(now)
            if now.ended:
                return _checked(now)
            time.sleep(interval_s)

    def pause(self) -> None:
        """Have the workers let go of it within seconds; chunks under way are run again after `resume`.

        One that has come to its end stays as it is.

        Raises:
            BackfillError: if there is no plan.
            BrokerUnavailable: if Redis does not answer: the workers are not told, but nothing new is sent any more.
        """
        self._want("pause")

    def cancel(self) -> None:
        """Have the workers let go of it for good; what is committed stays. As `pause`, but who follows is told."""
        self._want("cancel")

    # -- looking -----------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """How far it is; needs no Redis for what is committed.

        Raises:
            BackfillError: if there is no plan, or it cannot be read.
        """
        return self._status(None)

    def watch(self, interval_s: float = INTERVAL_S) -> Iterator[Status]:
        """Its status again and again until it ends; nothing is sent."""
        while True:
            now = self.status()
            yield now
            if now.ended:
                return
            time.sleep(interval_s)

    def errors(self) -> list[Cluster]:
        """The rows that have failed and that no retry has mended, by what went wrong, the most frequent first."""
        return clusters(remaining(self.job).values())

    def worth_retrying(self) -> bool:
        """Whether a retry may mend some row: one that cannot be read stays as it is, for the inputs must."""
        found = remaining(self.job).values() if len(self._stages.look()) > 1 else failures(self.job)
        return any(why.stage != "read" for why in found)

    def parts(self) -> list[str]:
        """The folders that hold predictions, each readable as one dataset, also while it runs."""
        return [f"{self.out}/{layout.PARTS}"]

    def verify(self, *, ids: bool = True, each: Callable[[int], None] | None = None) -> Report:
        """Check the committed output, retries included; see `nograd.tasks.backfill.verify`."""
        return verify_all(self.job, ids=ids, each=each)

    # -- how ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _stages(self) -> Stages:
        return Stages(self.job, self._client.app.backend.client)

    def _model_now(self, timeout_s: float) -> plans.ModelIdentity:
        """The model as a worker has it now."""
        extents = self.job.extents(0)
        sample = planning.identity_sample(self.job.plan, self.job.files(extents[0].file), extents)
        return planning.measure(self._client, sample, timeout_s).model

    def _asked(self) -> Request:
        if self._request is None:
            raise BackfillError(f"{self.out}: say model and source to plan a backfill")
        return self._request

    def _check_request(self, planned: Job, request: Request) -> None:
        """Refuse to go on with a plan when something else is asked for."""
        plan, spec = planned.plan, request.survey().spec
        wanted = msgspec.structs.replace(
            plan,
            source=spec,
            selection=request.selection,
            duplicates=request.duplicates,
            model=plan.model if request.model == plan.model.name else plans.ModelIdentity(name=request.model),
            parameters=dict(request.params),
            rows_per_chunk=request.rows_per_chunk or plan.rows_per_chunk,
            output=msgspec.structs.replace(plan.output, format=request.output or plan.output.format),
        )
        differences = plans.changes(plan, wanted)
        if differences:
            raise PlanChanged(f"{self.out} holds another backfill: {'; '.join(differences)}")

    def _check_retry(self, under_way: Job, only: Collection[str], retries_before: int) -> None:
        """Refuse to go on with a retry when another one is asked for."""
        if not only:
            return
        planned = rows_of(under_way, range(under_way.plan.chunks))
        failed = remaining(self.job, retries_before)
        if planned != {row for row, why in failed.items() if why.type in only}:
            raise PlanChanged(f"{under_way.store.url} is not finished, and is of other rows: retry without types first")

    def _set(self, store: Store | None = None, **changes: Any) -> None:
        """Change what is wanted, of the backfill itself or of a retry."""
        store = store or self._store
        state.write(store, msgspec.structs.replace(state.read(store), **changes))

    def _go(self) -> None:
        stage = self._stages.last()
        if self._budget_given:
            self._set(error_budget=self._budget)
        with self._client.broker.errors():
            self._list(stage)  # before it is wanted: who dies in between leaves nothing that is and nobody looks after
            since = stage.window.now()
        self._set(stage.job.store, wish="run", why=None, since=since)
        with self._client.broker.errors():
            stage.window.wish = "run"
        self._pump(stage, sending_s=0)

    @staticmethod
    def _list(stage: Stage) -> None:
        """Have workers look after it."""
        Watchlist(stage.window.client).put(stage.job)

    def _want(self, wish: Wish) -> None:
        stage = self._stages.last()
        if stage.closed:
            return
        self._set(stage.job.store, wish=wish, why=None)
        with self._client.broker.errors():
            stage.window.wish = wish

    @contextlib.contextmanager
    def _cancelled(self, stage: Stage) -> Iterator[None]:
        """Nobody need run a chunk of it to the end; if what is done meanwhile fails, it is wanted as before."""
        window = stage.window
        wish: Wish | None = None
        why = None
        with contextlib.suppress(BrokerUnavailable), self._client.broker.errors():
            wish, why = window.wish_since(state.read(stage.job.store).since) or "run", window.why
            window.wish = "cancel"
        try:
            yield
        except BaseException:
            if wish is not None:
                with contextlib.suppress(BrokerUnavailable), self._client.broker.errors():
                    if wish == "run":
                        self._list(stage)  # a worker that found it cancelled has let go of it
                    window.wish = wish
                    if why is not None:
                        window.stop(why)  # the one it had stopped for
            raise

    def _pump(self, stage: Stage, sending_s: float = SENDING_S) -> Pumped:
        job, app = stage.job, self._client.app
        with self._client.broker.errors():
            stage.window.out = self.out
            return pump(job, stage.window, lambda chunk: send_chunk(app, job, chunk), sending_s)

    def _turn(self) -> Status:
        """Keep it going, and look."""
        trouble, stage = None, self._stages.last()
        try:
            self._pump(stage)
        except BrokerUnavailable as err:
            trouble = err.message
        now = self._status(trouble)
        if now.over_budget and not now.ended and not now.retries:
            # A worker counts with what Redis remembers; the records remember all.
            rows = now.progress
            now = self._stopped(stage, now, f"{OVER_BUDGET}: {rows.rows_err} failed rows of {rows.rows} planned ones")
        elif now.state == "stopped" and state.read(stage.job.store).wish == "run":
            now = self._stopped(stage, now, now.why or "")
        return now

    def _stopped(self, stage: Stage, now: Status, why: str) -> Status:
        """Make a stop last."""
        self._set(stage.job.store, wish="pause", why=why)
        with contextlib.suppress(BrokerUnavailable), self._client.broker.errors():
            stage.window.stop(why)
        return msgspec.structs.replace(now, state="stopped", why=why)

    def _status(self, trouble: str | None) -> Status:
        *before, stage = self._stages.look()
        wanted = state.read(stage.job.store)
        hints: dict[str, Any] = {"queued": None, "running": None}
        try:
            with self._client.broker.errors():
                traffic = stage.window.traffic()
                hints = {"queued": traffic.queued, "running": traffic.running}
                wanted = state.wanted(wanted, stage.window)
        except BrokerUnavailable as err:
            trouble = trouble or err.message
        closed = stage.closed
        progress = self._stages.progress(wanted.since)
        budget = state.read(self._store).error_budget
        name = "done" if closed else _name(wanted.wish, wanted.why, progress, hints["running"])
        return Status(
            id=self.id,
            out=self.out,
            model=self.job.plan.model.name,
            state=name,
            why=wanted.why if name == "stopped" else None,
            error_budget=budget,
            may_fail=None if budget is None else allowed_failures(budget, self.job.plan.rows),
            trouble=trouble,
            retries=len(before),
            progress=progress,
            **hints,
        )


def _name(wish: Wish, why: str | None, progress: Progress, running: int | None) -> StateName:
    if wish == "cancel":
        return "cancelled"
    if wish == "pause":
        return "stopped" if why else "paused"
    if progress.stalled:
        return "stalled"
    if running is None:
        return "unknown"
    return "running" if running or progress.done else "waiting"


def _checked(now: Status) -> Status:
    """The end of a backfill, or why it ended otherwise."""
    if now.over_budget or (now.why or "").startswith(OVER_BUDGET):
        raise BudgetExceeded(
            f"{now.out}: {now.progress.rows_err:,} of {now.progress.rows:,} rows failed, "
            f"the error budget is {now.may_fail:,}; "
            "`nograd backfill errors` shows why, `resume --error-budget` goes on"
        )
    if now.state == "cancelled":
        raise BackfillCancelled(f"{now.out} was cancelled; what is committed stays, and it can be resumed")
    if now.state == "stopped":
        raise BackfillError(f"{now.out} is stopped: {now.why}")
    return now
