"""Transformers' pipelines: their preprocessing on CPU threads, their forward in our batches, their postprocessing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from transformers.pipelines import check_task, pipeline
from transformers.pipelines.base import ChunkPipeline, PipelineException, pad_collate_fn
from transformers.pipelines.pt_utils import PipelineIterator

from nograd.tasks.errors import InvalidInput
from nograd.tasks.modelfile import TransformersSpec

from .base import HostedModel
from .generation import TextGenerationModel
from .images import decode_image
from .inference import ready_for_inference
from .labels import read_labels
from .pretrained import check_vocabulary, length_class, open_component, open_network, position_limit
from .tensors import to_json
from .texts import check_text

if TYPE_CHECKING:
    from pathlib import Path

_CLASSIFICATION = ("text-classification", "image-classification")

#: The tasks with one text or one image as input and a prediction that JSON can hold → the parameters a job may set.
#: Not all that a pipeline takes: arguments of tokenizers go around our checks, and time limits are for downloads.
_TASKS: dict[str, tuple[str, ...]] = {
    "text-classification": ("top_k", "function_to_apply", "truncation", "max_length"),
    "token-classification": ("aggregation_strategy", "ignore_labels", "stride"),
    "feature-extraction": ("truncation",),
    "fill-mask": ("top_k", "targets"),
    "zero-shot-classification": ("candidate_labels", "hypothesis_template", "multi_label"),
    "image-classification": ("top_k", "function_to_apply"),
    "image-feature-extraction": ("pool",),
    "object-detection": ("threshold",),
    "zero-shot-image-classification": ("candidate_labels", "hypothesis_template"),
    "zero-shot-object-detection": ("candidate_labels", "threshold", "top_k"),
}


def open_transformers(name: str, spec: TransformersSpec, file: Path) -> HostedModel:
    """The hosted model of a transformers table: text generation is ours, every other task is a pipeline of theirs."""
    made = (TextGenerationModel if spec.task == "text-generation" else PipelineModel)(name, spec, file)
    made.loads_alone = spec.dtype != "float32"  # transformers makes it torch's default while it builds the network
    return made


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a pipeline's ``preprocess`` made of one input.

    Attributes:
        inputs: arguments of the network, in a batch of one; or the checked input itself for a chunking pipeline.
        tokens: how many tokens it has, 0 if it has none.
    """

    inputs: Any
    tokens: int = 0


class PipelineModel(HostedModel):
    """A pipeline, taken apart where it is made to be.

    Called whole, a pipeline preprocesses on the thread of its forward, and what batches well is found out by failing.
    Its three steps are public, so each runs where it belongs here, and only inputs that fit together share a batch.
    Pipelines that cut an input into chunks (token-classification, zero-shot-classification, …) are called whole.

    Classifications are ``{"label", "score", "top": [{"label", "score"}, …]}``; everything else is what the pipeline
    returns for a single input, as plain values.
    """

    spec: TransformersSpec
    _pipeline: Any
    _counter: Any  # a tokenizer that only counts
    _task: str

    def load(self, device: torch.device) -> None:
        """Load network, tokenizer or image processor, and build the pipeline; see `HostedModel.load`."""
        self._task, autos = self._check_task()
        self._check_keys()
        tokenizer = processor = None
        self._pads = False
        if self.spec.kind == "text" or self._task.startswith("zero-shot"):
            tokenizer = open_component(self, self.spec, transformers.AutoTokenizer)
        if self.spec.kind == "image":
            processor = open_component(self, self.spec, transformers.AutoImageProcessor)
        network = open_network(self, self.spec, autos)
        if tokenizer is not None:
            check_vocabulary(self, self.spec, tokenizer, network)
            self._pads = _make_paddable(tokenizer, network)
        self._name_classes(network)
        ready_for_inference(self, network, device, dynamic=True)
        self._pipeline = pipeline(
            self._task, model=network, tokenizer=tokenizer, image_processor=processor, device=device
        )
        self._whole = isinstance(self._pipeline, ChunkPipeline)
        self._collate = None if self._whole else pad_collate_fn(tokenizer, processor)
        self._longest = position_limit(network)
        if tokenizer is not None and self._longest is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, self._longest)  # where `truncation` cuts
        # A chunking pipeline tokenizes on the device thread; what counts tokens meanwhile must not be the same object.
        self._counter = copy.deepcopy(tokenizer) if self._whole else None
        # A fast tokenizer keeps padding and truncation inside, and raises if two threads set them at once.
        self._tokenizing = threading.Lock()

    def modules(self) -> Sequence[Any]:
        """The pipeline's network."""
        return [self._pipeline.model]

    def prepare(self, input: Any, params: Mapping[str, Any]) -> Prepared:  # noqa: A002
        """Check one input, and run the pipeline's ``preprocess`` on it.

        Raises:
            InvalidInput: for another kind of input, unknown or bad parameters, and texts too long for the model.
        """
        steps = self._split_params(params)
        if self.spec.kind == "image":
            image = decode_image(input)
            return Prepared(image if self._whole else self._preprocess(image, steps[0]))
        text = check_text(input)
        with self._tokenizing:
            inputs = self._counter(text, verbose=False) if self._whole else self._preprocess(text, steps[0])
        tokens = len(inputs["input_ids"]) if self._whole else inputs["input_ids"].shape[-1]
        if self._longest is not None and tokens > self._longest and "stride" not in self.settings(params):
            cut = "; shorten it" if self._whole else "; shorten it, or let the parameter `truncation` cut it off"
            raise InvalidInput(f"the text has {tokens} tokens, the model takes {self._longest}{cut}")
        return Prepared(text if self._whole else inputs, tokens)

    def _preprocess(self, value: Any, params: Mapping[str, Any]) -> Any:
        try:
            return self._pipeline.preprocess(value, **params)
        except (ValueError, TypeError, PipelineException) as err:
            raise InvalidInput(str(err)) from err

    def bucket(self, prepared: Prepared) -> Hashable:
        """A class of lengths for tokens, if they can be padded; the shape for all other tensors, which are not."""
        if self._whole:
            return prepared.inputs.size if isinstance(prepared.inputs, Image.Image) else None
        padded = self._pads and prepared.tokens > 0
        return tuple(
            (name, length_class(value.shape[1]) if padded and value.ndim == 2 else tuple(value.shape))
            for name, value in sorted(prepared.inputs.items())
            if isinstance(value, torch.Tensor)
        )

    def cost(self, prepared: Prepared) -> int:
        """The tokens of a text, the elements or pixels of an image."""
        if prepared.tokens or self._whole:
            size = prepared.inputs.size if isinstance(prepared.inputs, Image.Image) else (1, 1)
            return prepared.tokens or int(size[0] * size[1])
        return sum(value.numel() for value in prepared.inputs.values() if isinstance(value, torch.Tensor))

    def forward(self, batch: Sequence[Prepared], params: Mapping[str, Any]) -> Sequence[Any]:
        """Run the network on all inputs at once; the pipeline's own code splits what it returns."""
        inputs = [item.inputs for item in batch]
        if self._collate is None:
            return list(self._pipeline(inputs, batch_size=len(batch), **self.settings(params)))
        _, forward_params, _ = self._split_params(params)
        joined = inputs[0] if len(batch) == 1 else self._collate(inputs)
        outputs = list(PipelineIterator([joined], self._pipeline.forward, forward_params, loader_batch_size=len(batch)))
        if self._task == "feature-extraction":
            return [self._without_padding(output[0], item.tokens) for output, item in zip(outputs, batch, strict=True)]
        return outputs

    def finish(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Run the pipeline's ``postprocess``.

        Raises:
            ModelFailed: if the prediction holds what JSON cannot, an image for instance.
        """
        if self._whole or self._task == "feature-extraction":
            return to_json(output)
        _, _, postprocess_params = self._split_params(params)
        prediction = self._pipeline.postprocess(output, **postprocess_params)
        if self._task in _CLASSIFICATION:
            return {**prediction[0], "top": prediction}
        return to_json(prediction)

    def examples(self) -> Sequence[Any]:
        """The model file's example, else two words or a grey image."""
        if self.spec.example is not None:
            return super().examples()
        if self.spec.kind == "image":
            import numpy as np

            return [np.full((64, 64, 3), 127, dtype=np.uint8)]
        mask = getattr(self._pipeline.tokenizer, "mask_token", None)
        return [f"warm up {mask}" if self._task == "fill-mask" else "warm up"]

    def _check_task(self) -> tuple[str, Sequence[Any]]:
        """The task under its own name, not an alias, and the auto classes that load its networks."""
        try:
            name, details, _ = check_task(self.spec.task)
        except KeyError:
            name = None
        if name not in _TASKS:
            raise self.error("task", self.spec.task, f"nograd serves text-generation, {', '.join(_TASKS)}")
        return name, details["pt"]

    def _check_keys(self) -> None:
        for key in ("transform", "shape"):
            if (value := getattr(self.spec, key)) is not None:
                raise self.error(key, value, "a pipeline brings its own preprocessing")
        if self.spec.channels_last and self.spec.kind == "text":
            raise self.error("channels_last", True, "only images have channels")
        if self.spec.kind not in ("text", "image"):
            raise self.error("input", self.spec.kind, "loader 'transformers' takes text or image")
        if self.spec.labels is not None and self._task not in _CLASSIFICATION:
            raise self.error("labels", self.spec.labels, f"only for {' and '.join(_CLASSIFICATION)}")

    def _name_classes(self, network: Any) -> None:
        """Put the model file's labels in the place of the network's own."""
        labels = read_labels(self)
        if labels is None:
            return
        if len(labels) != network.config.num_labels:
            raise self.error("labels", self.spec.labels, f"{len(labels)} for {network.config.num_labels} classes")
        network.config.id2label = dict(enumerate(labels))
        network.config.label2id = {label: index for index, label in enumerate(labels)}

    def _split_params(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The parameters of a prediction, by the step they are for.

        Raises:
            InvalidInput: for unknown ones, and for values that the pipeline refuses.
        """
        wanted = self.settings(params)
        for name in wanted:
            if name not in _TASKS[self._task]:
                raise InvalidInput(f"unknown parameter {name!r}; {self._task} takes {', '.join(_TASKS[self._task])}")
        if self._task in _CLASSIFICATION:
            top = wanted.setdefault("top_k", self.spec.top)
            if type(top) is not int or top < 1:
                raise InvalidInput(f"parameter top_k = {top!r}: expected a whole number, at least 1")
        pipe = self._pipeline
        try:
            with self._tokenizing:  # the targets of fill-mask are tokens
                steps = pipe._sanitize_parameters(**wanted)  # noqa: SLF001 - what custom pipelines override by this name
        except (ValueError, TypeError, KeyError) as err:
            raise InvalidInput(f"parameters {wanted!r}: {err}") from err
        own = (pipe._preprocess_params, pipe._forward_params, pipe._postprocess_params)  # noqa: SLF001 - as above
        preprocess, forward, postprocess = ({**ours, **theirs} for ours, theirs in zip(own, steps, strict=True))
        return preprocess, forward, postprocess

    def _without_padding(self, states: torch.Tensor, tokens: int) -> torch.Tensor:
        """The hidden states of a text's own tokens, ``(1, tokens, size)``."""
        left = self._pipeline.tokenizer.padding_side == "left"
        return states[:, -tokens:] if left else states[:, :tokens]


def _make_paddable(tokenizer: Any, network: Any) -> bool:
    """Let batches be formed with a tokenizer that has no padding token (GPT-2's); whether texts can really be padded.

    Another token in its place (the end of text, usually) would be taken for padding where a text contains it. So texts
    of one length go together, and nothing is padded: a token that none is stands in where transformers insists on one.
    """
    if tokenizer.pad_token_id is not None:
        if getattr(network.config, "pad_token_id", 0) is None:
            network.config.pad_token_id = tokenizer.pad_token_id
        return True
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    network.config.pad_token_id = -1
    return False
