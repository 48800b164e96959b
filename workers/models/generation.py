"""Text generation: greedy unless asked otherwise, in left-padded batches whose rows do not notice each other."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
from msgspec import UNSET, Meta, UnsetType

from nograd.tasks.errors import InvalidInput
from nograd.tasks.modelfile import TransformersSpec
from nograd.tasks.structs import decodable

from .base import HostedModel
from .inference import ready_for_inference
from .pretrained import check_vocabulary, length_class, open_component, open_network, position_limit
from .texts import check_text

_Fraction = Annotated[float, Meta(gt=0, le=1)]


@decodable
class GenerationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a text generation, by their names in transformers. Unset ones are the model's own.

    Attributes:
        max_new_tokens: tokens after the prompt.
        min_new_tokens: tokens before the end of text is allowed.
        do_sample: draw the next token at random; the five settings below have a meaning only then. False is greedy.
        temperature: above 1 flattens the distribution, below sharpens it.
        top_k: draw from that many of the likeliest tokens.
        top_p: draw from the likeliest tokens that have this probability together.
        min_p: draw from tokens at least this likely, relative to the likeliest.
        typical_p: draw from locally typical tokens.
        num_beams: beam search over that many beams.
        length_penalty: exponent of the length in a beam's score.
        early_stopping: end a beam search once there are ``num_beams`` candidates.
        repetition_penalty: above 1 makes tokens that have been there less likely.
        no_repeat_ngram_size: no sequence of that many tokens comes twice.
        return_full_text: the prompt and its continuation, or only the continuation.
        return_token_ids: also the tokens of the continuation.
    """

    max_new_tokens: Annotated[int, Meta(ge=1)] = 50
    min_new_tokens: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    do_sample: bool = False
    temperature: Annotated[float, Meta(gt=0)] | UnsetType = UNSET
    top_k: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    top_p: _Fraction | UnsetType = UNSET
    min_p: _Fraction | UnsetType = UNSET
    typical_p: _Fraction | UnsetType = UNSET
    num_beams: Annotated[int, Meta(ge=1, le=64)] | UnsetType = UNSET
    length_penalty: float | UnsetType = UNSET
    early_stopping: bool | UnsetType = UNSET
    repetition_penalty: Annotated[float, Meta(gt=0)] | UnsetType = UNSET
    no_repeat_ngram_size: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    return_full_text: bool = True
    return_token_ids: bool = False


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_OURS = ("return_full_text", "return_token_ids")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its tokens.

    Attributes:
        text: as the caller wrote it.
        ids: its tokens.
        group: what prompts of one batch have in common.
        longest: tokens it may have in the end, the new ones included.
    """

    text: str
    ids: list[int]
    group: Hashable
    longest: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the model wrote after a prompt, up to its own end of text."""

    prompt: Prompt
    ids: list[int]


class TextGenerationModel(HostedModel):
    """A causal language model and its tokenizer.

    Predictions are ``{"text"}``: the prompt and its continuation, as transformers' own pipeline gives them.
    """

    spec: TransformersSpec
    _tokenizer: Any
    _network: Any

    def load(self, device: torch.device) -> None:
        """Load network and tokenizer; see `HostedModel.load`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._check_keys()
        self.device = device
        self._tokenizer = open_component(self, self.spec, AutoTokenizer)
        self._network = open_network(self, self.spec, [AutoModelForCausalLM])
        check_vocabulary(self, self.spec, self._tokenizer, self._network)
        ready_for_inference(self, self._network, device)
        # A fast tokenizer keeps padding and truncation inside, and raises if two threads set them at once.
        self._tokenizing = threading.Lock()
        self._positions = position_limit(self._network)
        self._own = self._take_sampling_defaults()
        eos = self._network.generation_config.eos_token_id
        self._ends = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        own_pad = self._tokenizer.pad_token_id
        self._pad = own_pad if own_pad is not None else min(self._ends, default=0)  # masked, so any token will do

    def modules(self) -> Sequence[Any]:
        """The network."""
        return [self._network]

    def _take_sampling_defaults(self) -> dict[str, Any]:
        """The model's own sampling settings, taken out of its configuration.

        Left in there, they are warned about in every greedy generation, and its ``max_length`` in every one that says
        ``max_new_tokens``.
        """
        config = self._network.generation_config
        own = {name: value for name in _SAMPLING if (value := getattr(config, name, None)) is not None}
        config.update(**dict.fromkeys(own), do_sample=False, max_length=None)
        return own

    def prepare(self, input: Any, params: Mapping[str, Any]) -> Prompt:  # noqa: A002
        """Tokenize one prompt.

        Raises:
            InvalidInput: for what is no text, unknown or bad parameters, and prompts too long for the model.
        """
        wanted = self._params(params)
        text = check_text(input)
        with self._tokenizing:
            ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            raise InvalidInput("the text has no tokens")
        if self._positions is not None and len(ids) + wanted.max_new_tokens > self._positions:
            raise InvalidInput(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {wanted.max_new_tokens}; "
                f"the model takes {self._positions} together"
            )
        # Penalties on repetition see the padding of a row, too: then only prompts of one length go together.
        group = ("exactly", len(ids)) if self._penalizes(wanted) else length_class(len(ids))
        return Prompt(text, ids, group, len(ids) + wanted.max_new_tokens)

    def bucket(self, prepared: Prompt) -> Hashable:
        """A class of lengths, so that padding stays in bounds."""
        return prepared.group

    def cost(self, prepared: Prompt) -> int:
        """The tokens it may have in the end: so many places of the cache are its own."""
        return prepared.longest

    def forward(self, batch: Sequence[Prompt], params: Mapping[str, Any]) -> Sequence[Continuation]:
        """Continue each prompt: left-padded, so that all of them end where the new tokens begin."""
        wanted = self._params(params)
        width = max(len(prompt.ids) for prompt in batch)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        written = self._network.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            pad_token_id=self._pad,
            num_return_sequences=1,
            return_dict_in_generate=False,
            **self._generate_options(wanted),
        )
        return [
            Continuation(prompt, self._until_end(row))
            for prompt, row in zip(batch, written[:, width:].tolist(), strict=True)
        ]

    def finish(self, output: Continuation, params: Mapping[str, Any]) -> dict[str, Any]:
        """Decode: ``{"text"}``, and ``"token_ids"`` of the continuation if asked for."""
        wanted = self._params(params)
        # Decoded with its prompt: many tokenizers write a token differently at the beginning of a text.
        head = self._decode(output.prompt.ids)
        whole = self._decode([*output.prompt.ids, *output.ids])
        new = whole.removeprefix(head) if whole.startswith(head) else self._decode(output.ids)
        prediction: dict[str, Any] = {"text": output.prompt.text + new if wanted.return_full_text else new}
        if wanted.return_token_ids:
            prediction["token_ids"] = output.ids
        return prediction

    def examples(self) -> Sequence[Any]:
        """The model file's example, else two words."""
        return super().examples() or ["warm up"]

    def warm_up_params(self) -> Mapping[str, Any]:
        """A few tokens: the time of one is known after that."""
        wanted = self._params({})
        few = {"max_new_tokens": min(wanted.max_new_tokens, 4)}
        return few if wanted.min_new_tokens is UNSET else {**few, "min_new_tokens": 0}

    def _check_keys(self) -> None:
        for key in ("transform", "labels", "shape"):
            if (value := getattr(self.spec, key)) is not None:
                raise self.error(key, value, "has no meaning for text-generation")
        if self.spec.kind != "text":
            raise self.error("input", self.spec.kind, "text-generation takes text")
        if self.spec.compile:
            raise self.error("compile", True, "not for text-generation: it would compile anew for every length")
        if self.spec.channels_last:
            raise self.error("channels_last", True, "only images have channels")
        try:
            self._params({})
        except InvalidInput as err:
            raise self.error("params", self.spec.params, err.message) from err

    def _params(self, params: Mapping[str, Any]) -> GenerationParams:
        try:
            return msgspec.convert(self.settings(params), GenerationParams)
        except msgspec.ValidationError as err:
            what, _, where = str(err).partition(" - at `$.")
            if "unknown field" in what:
                name = what.rpartition("unknown field `")[2].rstrip("`")
                raise InvalidInput(
                    f"unknown parameter {name!r}; text-generation takes {', '.join(GenerationParams.__struct_fields__)}"
                ) from None
            name = where.rstrip("`")
            raise InvalidInput(f"parameter {name} = {self.settings(params).get(name)!r}: {what}") from None

    def _generate_options(self, wanted: GenerationParams) -> dict[str, Any]:
        options = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not UNSET}
        for name in _OURS:
            del options[name]
        if wanted.do_sample:
            return {**self._own, **options}
        return {name: value for name, value in options.items() if name not in _SAMPLING}

    def _penalizes(self, wanted: GenerationParams) -> bool:
        config = self._network.generation_config
        penalty = config.repetition_penalty if wanted.repetition_penalty is UNSET else wanted.repetition_penalty
        ngram = config.no_repeat_ngram_size if wanted.no_repeat_ngram_size is UNSET else wanted.no_repeat_ngram_size
        return penalty not in (None, 1) or bool(ngram)

    def _until_end(self, ids: list[int]) -> list[int]:
        """A row without its end of text and the padding behind it."""
        return next((ids[:i] for i, token in enumerate(ids) if token in self._ends), ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
