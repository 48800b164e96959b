"""The laws of `nograd.workers.forward`, with models that fail in every way."""

import gc
import weakref

import pytest
import torch

from nograd.tasks.errors import InvalidInput, JobError, ModelFailed, OutputMismatch, Overloaded
from nograd.tasks.predict import Outcome
from nograd.workers.batching import Item
from nograd.workers.faults import DeviceLost
from nograd.workers.forward import run_isolated, run_pieces, to_end

CPU = torch.device("cpu")


class Job:
    def __init__(self):
        self.params = {}


class Model:
    """Records the sizes of its forwards; ``body`` says what one does."""

    name = "m"

    def __init__(self, body):
        self.body = body
        self.sizes = []

    def forward(self, batch, params):
        self.sizes.append(len(batch))
        return self.body(batch)


def run(body, values):
    """The outcomes in the order of the values, the model, and what fits."""
    model, outcomes = Model(body), {}

    def keep(item, outcome):
        assert item not in outcomes  # exactly one
        outcomes[item] = outcome

    items = [Item("m", None, value, Job()) for value in values]
    fits = run_isolated(model, items, CPU, lambda piece: None, keep)
    return [outcomes[item] for item in items], model, fits


def raising(error, bad):
    def body(batch):
        if any(value in bad for value in batch):
            raise type(error)(*error.args)
        return batch

    return body


@pytest.mark.parametrize("bad", [{0}, {9}, {3, 4}, set(range(10)), {2, 5, 7}], ids=str)
@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(1), KeyboardInterrupt(), InvalidInput("no")])
def test_whoever_raises_fails_alone(bad, error):
    outcomes, _, fits = run(raising(error, bad), range(10))
    expected = InvalidInput if isinstance(error, InvalidInput) else ModelFailed
    assert [type(outcome.error) if outcome.error else outcome.value for outcome in outcomes] == [
        expected if n in bad else n for n in range(10)
    ]
    assert fits is None
    errors = [outcome.error for outcome in outcomes if outcome.error]
    assert len(set(map(id, errors))) == len(errors)  # each its own: raising one adds to its traceback


@pytest.mark.parametrize("answer", [[], [1] * 5, [1] * 100])
def test_no_output_is_used_while_there_is_another_number_of_them_than_of_inputs(answer):
    outcomes, _, _ = run(lambda batch: answer, range(4))
    assert [type(outcome.error) for outcome in outcomes] == [OutputMismatch] * 4
    assert f"{len(answer)} outputs for 1 inputs" in str(outcomes[0].error)


@pytest.mark.parametrize("bad", [{0}, {9}, {3, 4}, {2, 5, 7}], ids=str)
@pytest.mark.parametrize("times", [0, 2])
def test_whoever_gets_another_number_of_outputs_fails_alone(bad, times, caplog):
    outcomes, _, _ = run(lambda batch: [n for n in batch for _ in range(times if n in bad else 1)], range(10))
    assert [type(outcome.error) if outcome.error else outcome.value for outcome in outcomes] == [
        OutputMismatch if n in bad else n for n in range(10)
    ]
    assert "outputs for 10 inputs; none of them is used" in caplog.text


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
]


def short_of_memory(fits, error):
    def body(batch):
        if len(batch) > fits:
            raise error
        return batch

    return body


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_what_runs_out_of_memory_is_split_and_nothing_larger_than_what_fits_is_tried_again(error):
    outcomes, model, fits = run(short_of_memory(3, error), range(16))
    assert outcomes == [Outcome(value=n) for n in range(16)]
    assert fits == 2
    assert model.sizes == [16, 8, 4] + [2] * 8


@pytest.mark.parametrize("error", MEMORY[:5], ids=repr)
def test_an_input_that_does_not_fit_alone_is_to_be_tried_later(error):
    outcomes, _, fits = run(short_of_memory(0, error), [1])
    assert type(outcomes[0].error) is Overloaded
    assert outcomes[0].error.retryable
    assert fits is None  # there is nothing to learn from it


def test_one_input_that_is_too_large_does_not_make_the_batches_of_the_others_small():
    def body(batch):
        if 3 in batch:
            raise MemoryError
        return batch

    outcomes, model, fits = run(body, range(16))
    assert [type(outcome.error) for outcome in outcomes] == [type(None)] * 3 + [Overloaded] + [type(None)] * 12
    assert fits is None
    assert model.sizes == [16, 8, 4, 2, 2, 1, 1, 4, 8]


def test_what_cudnn_does_not_support_on_a_single_input_is_no_matter_of_memory():
    outcomes, _, fits = run(short_of_memory(0, MEMORY[5]), [1])
    assert type(outcomes[0].error) is ModelFailed
    assert fits is None


def test_an_odd_batch_is_split_into_what_fits():
    outcomes, model, fits = run(short_of_memory(2, MEMORY[0]), range(5))
    assert [outcome.value for outcome in outcomes] == list(range(5))
    assert (model.sizes, fits) == ([5, 2, 2, 1], 2)


@pytest.mark.parametrize("error", [*MEMORY[:2], ValueError("no"), OutputMismatch("no")], ids=repr)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_memory_of_a_failed_forward_is_free_before_the_next_one(error, wrapped):
    held = []

    def body(batch):
        if held:
            gc.collect()
            assert held[0]() is None
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        if batch[0] == 1:
            raise type(error)(*error.args)
        return [int(activations.sum())] * len(batch)

    def wrapping(batch):
        try:
            return body(batch)
        except type(error) as err:
            raise type(error)("could not score") from err

    outcomes, _, _ = run(wrapping if wrapped else body, [1, 2])
    assert len(held) == 3
    assert [outcome.error is None for outcome in outcomes] == [False, True]
    gc.collect()
    assert held[1]() is None  # nor does the outcome of the one that failed alone keep it


def test_a_lost_device_is_not_asked_again_and_what_was_done_before_counts():
    done = []

    def body(batch):
        if len(batch) > 1:
            raise ValueError("split me")
        if batch[0] == 1:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return batch

    model = Model(body)
    items = [Item("m", None, value, Job()) for value in range(4)]
    with pytest.raises(DeviceLost, match="device-side assert"):
        run_isolated(model, items, CPU, lambda piece: None, lambda item, outcome: done.append(item))
    assert done == items[:1]
    assert model.sizes == [4, 2, 1, 1]


def test_a_job_error_of_the_model_keeps_its_type_in_each_place():
    class OwnError(JobError):
        pass

    outcomes, _, _ = run(raising(OwnError("mine"), {1}), range(2))
    assert type(outcomes[1].error) is OwnError


@pytest.mark.parametrize(("fits", "sizes"), [(None, [10, 5, 2, 2, 1, 2, 2, 1]), (2, [2] * 5)])
def test_what_fits_is_found_out_once(fits, sizes):
    """A backfill's batches are cut from a tensor, and begin with what the last one found out."""
    rows, done = torch.arange(10), {}
    model = Model(short_of_memory(2, MemoryError()))

    def keep(piece, outputs):
        done.update(zip(piece, outputs, strict=True))

    found = to_end(
        run_pieces(
            model, range(10), lambda piece: rows[piece[0] : piece[-1] + 1], {}, CPU, lambda piece: None, keep, fits
        )
    )
    assert found == 2
    assert model.sizes == sizes
    assert {row: int(output) for row, output in done.items()} == {row: row for row in range(10)}


@pytest.mark.parametrize("error", [ValueError, ModelFailed], ids=repr)
def test_a_model_that_wraps_the_error_of_a_lost_device_does_not_hide_it(error):
    def body(batch):
        try:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        except RuntimeError as err:
            raise error("could not score") from err

    with pytest.raises(DeviceLost, match="could not score"):
        run(body, [1, 2])


def test_an_error_that_is_its_own_cause_is_looked_at_once():
    def body(batch):
        first, second = ValueError("first"), ValueError("second")
        first.__cause__, second.__context__ = second, first
        raise first

    outcomes, _, _ = run(body, [1])
    assert type(outcomes[0].error) is ModelFailed
