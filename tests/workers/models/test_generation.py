import json
import threading

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

from nograd.tasks.errors import InvalidInput, ModelFileError

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.",
    "I met a traveller from an antique land, who said: two vast and trunkless legs of stone stand in the desert.",
    "Grüße an die Füchse und 😀.",
]
PROMPTS = ["The quick", "Shall I compare thee to", "two", "Grü", "a stone's antique dog"]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 with random weights and a real tokenizer, saved as the hub's own is: no padding token, odd defaults."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(CORPUS * 4, vocab_size=400, min_frequency=1, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token=END, bos_token=END)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,  # so that its greedy texts are not one token over and over
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    )
    network = GPT2LMHeadModel(config)
    network.generation_config.update(do_sample=True, temperature=0.7, top_k=50, max_length=20)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(folder, extra="params = { max_new_tokens = 12 }"):
    return f'loader = "transformers"\ntask = "text-generation"\nmodel = "{folder}"\n{extra}\n'


def greedy(folder, prompt, steps, end=0):
    """The loop of the notebook: the likeliest token, again and again, until the end of text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    network = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            token = network(ids).logits[:, -1, :].argmax(-1)
            if token.item() == end:
                break
            ids = torch.cat((ids, token.unsqueeze(0)), dim=1)
    return ids[0, start:].tolist(), tokenizer.decode(ids[0, start:], skip_special_tokens=True)


WITH_IDS = {"return_token_ids": True}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_is_continued_as_by_the_notebook_s_loop(hosted, predict, gpt2, prompt):
    (answer,) = predict(hosted(table(gpt2)), [prompt], WITH_IDS)
    ids, text = greedy(gpt2, prompt, 12)
    assert answer["token_ids"] == ids
    assert answer["text"].startswith(prompt)
    assert len(set(ids)) > 3, "the model says nothing of interest"
    if prompt != "Grü":  # whose last bytes may belong to a character that goes on
        assert answer["text"] == prompt + text


def test_prompts_of_mixed_lengths_do_not_notice_each_other(hosted, predict, gpt2):
    model = hosted(table(gpt2))
    answers = predict(model, PROMPTS, WITH_IDS)
    assert len({len(model.prepare(prompt, {}).ids) for prompt in PROMPTS}) > 2
    assert [answer["token_ids"] for answer in answers] == [greedy(gpt2, prompt, 12)[0] for prompt in PROMPTS]
    assert answers == [predict(model, [prompt], WITH_IDS)[0] for prompt in PROMPTS]
    json.dumps(answers)


def test_the_answer_is_the_one_of_transformers_own_pipeline(hosted, predict, gpt2):
    theirs = pipeline("text-generation", model=str(gpt2), device="cpu")
    for full in (True, False):
        wanted = theirs(PROMPTS[0], max_new_tokens=12, do_sample=False, return_full_text=full)[0]["generated_text"]
        assert predict(hosted(table(gpt2)), PROMPTS[:1], {"return_full_text": full}) == [{"text": wanted}]


def test_each_row_stops_at_its_own_end_of_text(hosted, predict, gpt2, tmp_path):
    """With the end moved to a token that one prompt comes to early, and another late or never."""
    ids = {prompt: greedy(gpt2, prompt, 12)[0] for prompt in PROMPTS}
    end = ids["two"][2]
    folder = tmp_path / "other end"
    network = GPT2LMHeadModel.from_pretrained(gpt2)
    network.generation_config.update(eos_token_id=[end, 0])
    network.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(gpt2).save_pretrained(folder)
    answers = predict(hosted(table(folder)), PROMPTS, WITH_IDS)
    wanted = [ids[prompt][: ids[prompt].index(end)] if end in ids[prompt] else ids[prompt] for prompt in PROMPTS]
    assert [answer["token_ids"] for answer in answers] == wanted
    assert len({len(row) for row in wanted}) > 1


def test_the_job_s_parameters_win_over_the_model_file_s_and_fifty_is_the_default(hosted, predict, gpt2):
    model = hosted(table(gpt2))
    assert len(predict(model, ["two"], {"max_new_tokens": 3, **WITH_IDS})[0]["token_ids"]) == 3
    assert model._params({}).max_new_tokens == 12
    assert hosted(table(gpt2, ""))._params({}).max_new_tokens == 50


def test_sampling_only_happens_when_asked_for(hosted, predict, gpt2):
    """Although the saved defaults say ``do_sample``."""
    model = hosted(table(gpt2))
    assert len({predict(model, ["two"], {"temperature": 5.0})[0]["text"] for _ in range(4)}) == 1
    sampled = {predict(model, ["two"], {"do_sample": True, "temperature": 5.0})[0]["text"] for _ in range(4)}
    assert len(sampled) > 1


def test_beams_and_penalties_are_passed_on(hosted, predict, gpt2):
    model = hosted(table(gpt2))
    plain = predict(model, ["two"])
    assert predict(model, ["two"] * 2, {"num_beams": 3})[0] != plain[0]
    once = predict(model, ["two"], {"no_repeat_ngram_size": 1, **WITH_IDS})[0]["token_ids"]
    assert len(set(once)) == len(once)


def test_a_prompt_costs_the_tokens_it_may_have_in_the_end(hosted, gpt2):
    model = hosted(table(gpt2))
    short, long = (model.prepare(text, {"max_new_tokens": 7}) for text in ("two", "The quick brown"))
    assert model.cost(short) == len(short.ids) + 7
    assert model.cost(long) > model.cost(short)


def test_prompts_of_unequal_length_share_no_batch_where_padding_would_be_penalized(hosted, gpt2):
    model = hosted(table(gpt2))
    short, long = "two", "The quick brown"
    assert model.bucket(model.prepare(short, {})) == model.bucket(model.prepare(long, {}))
    for params in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        assert model.bucket(model.prepare(short, params)) != model.bucket(model.prepare(long, params))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (3, "the model takes text, not a int"),
        (None, "the model takes text, not a NoneType"),
        (["two"], "the model takes text, not a list"),
        (b"two", "the model takes text, not a bytes"),
        ("", "the text is empty"),
        ("\ud800", "not valid Unicode: surrogates not allowed at character 0"),
        ("two " * 60, r"the prompt has \d+ tokens and max_new_tokens is 12; the model takes 64 together"),
    ],
)
def test_what_cannot_be_continued_is_the_caller_s_fault(hosted, gpt2, value, why):
    with pytest.raises(InvalidInput, match=why):
        hosted(table(gpt2)).prepare(value, {})


def test_the_length_of_prompt_and_continuation_counts_together(hosted, predict, gpt2):
    model = hosted(table(gpt2))
    tokens = len(model.prepare("two", {}).ids)
    assert predict(model, ["two"], {"max_new_tokens": 64 - tokens})
    with pytest.raises(InvalidInput, match="the model takes 64 together"):
        model.prepare("two", {"max_new_tokens": 65 - tokens})


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"max_tokens": 3}, "unknown parameter 'max_tokens'; text-generation takes max_new_tokens, "),
        ({"max_new_tokens": "3"}, r"parameter max_new_tokens = '3': Expected `int`, got `str`"),
        ({"max_new_tokens": True}, "parameter max_new_tokens = True: Expected `int`"),
        ({"max_new_tokens": 0}, "parameter max_new_tokens = 0: Expected `int` >= 1"),
        ({"temperature": 0, "do_sample": True}, "parameter temperature = 0: Expected `float` > 0"),
        ({"top_p": 1.5}, "parameter top_p = 1.5: Expected `float` <= 1"),
        ({"trust_remote_code": True}, "unknown parameter 'trust_remote_code'"),
    ],
)
def test_parameters_are_checked_by_name_type_and_range(hosted, opened, gpt2, params, why):
    with pytest.raises(InvalidInput, match=why):
        hosted(table(gpt2)).prepare("two", params)
    in_toml = ", ".join(f"{name} = {json.dumps(value)}" for name, value in params.items())
    with pytest.raises(ModelFileError, match=rf"models.toml: \[it\] params = .*{why}"):
        opened(table(gpt2, f"params = {{ {in_toml} }}")).load(torch.device("cpu"))


def test_prompts_are_tokenized_on_many_threads_at_once(hosted, gpt2):
    model = hosted(table(gpt2))
    wanted = {prompt: model.prepare(prompt, {}).ids for prompt in PROMPTS}
    wrong = []

    def work():
        for _ in range(50):
            for prompt, ids in wanted.items():
                try:
                    wrong.extend([] if model.prepare(prompt, {}).ids == ids else [prompt])
                except RuntimeError as err:  # "Already borrowed"
                    wrong.append(err)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(opened, gpt2, tmp_path):
    folder = tmp_path / "bad"
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelFileError, match=r"its tokenizer has \d+ tokens, its network only \d+"):
        opened(table(folder)).load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ("compile = true", "compile = True: not for text-generation"),
        ("channels_last = true", "channels_last = True: only images have channels"),
        ('input = "image"', "input = 'image': text-generation takes text"),
        ("shape = [3]", r"shape = \[3\]: has no meaning for text-generation"),
        ('labels = ["a"]', "has no meaning for text-generation"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(opened, gpt2, extra, why):
    with pytest.raises(ModelFileError, match=why):
        opened(table(gpt2, extra)).load(torch.device("cpu"))


def test_the_dtype_of_the_model_file_wins_over_the_checkpoint_s(hosted, predict, gpt2):
    model = hosted(table(gpt2, 'dtype = "bfloat16"\nparams = { max_new_tokens = 3 }'))
    assert model._network.dtype == torch.bfloat16
    assert len(predict(model, PROMPTS)) == len(PROMPTS)
    assert hosted(table(gpt2))._network.dtype == torch.float32
