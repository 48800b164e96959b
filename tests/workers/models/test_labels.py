import pytest
import torch

from nograd.tasks.errors import ModelFailed
from nograd.workers.models.labels import classify


def test_logits_become_softmax_scores_best_first():
    answer = classify(torch.tensor([1.0, 3.0, 2.0]), ["a", "b", "c"], top=2)
    assert answer["label"] == "b"
    assert answer["score"] == pytest.approx(0.66524, abs=1e-5)
    assert [entry["label"] for entry in answer["top"]] == ["b", "c"]
    assert answer["top"][0] == {"label": answer["label"], "score": answer["score"]}


def test_scores_are_computed_in_float32_and_sum_to_one():
    answer = classify(torch.randn(1000).half() * 10, [str(i) for i in range(1000)], top=1000)
    assert sum(entry["score"] for entry in answer["top"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([1])])
def test_a_model_that_takes_the_argmax_itself_names_the_class(index):
    assert classify(index, ["a", "b"], top=5) == {"label": "b"}


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (torch.zeros(3), r"2 labels name the values of a vector; the model's output has shape \(3,\)"),
        (torch.zeros(2, 2), r"shape \(2, 2\)"),
        (torch.tensor(0.5), r"shape \(\)"),
        (torch.tensor(2), r"class 2; there are 2 labels"),
        (torch.tensor(-1), r"class -1"),
    ],
)
def test_labels_that_do_not_fit_the_output_are_an_error(output, why):
    with pytest.raises(ModelFailed, match=why):
        classify(output, ["a", "b"], top=5)
