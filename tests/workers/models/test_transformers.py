import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import pipeline

from nograd.tasks.errors import InvalidInput, ModelFileError
from nograd.workers.models.images import decode_image
from nograd.workers.models.pretrained import length_class

TEXTS = ["a fox", "the quick brown fox jumps over the lazy dog", "shall i compare thee to a summer's day"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SENTIMENTS = {0: "bad", 1: "so so", 2: "good"}


def bert_tokenizer():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As sentence-transformers save theirs: padding and truncation inside, which a batch must not inherit.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, saved as their authors save them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    tokenizer = bert_tokenizer()
    bert = transformers.BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        num_labels=3,
        id2label=SENTIMENTS,
        initializer_range=0.3,
        **SMALL,
    )
    entailment = {0: "contradiction", 1: "neutral", 2: "entailment"}
    nli = transformers.BertConfig(
        **{**bert.to_dict(), "id2label": entailment, "label2id": {v: k for k, v in entailment.items()}}
    )
    gpt2 = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=4, num_labels=3, initializer_range=0.3
    )
    for name, network in {
        "classifier": transformers.BertForSequenceClassification(bert),
        "nli": transformers.BertForSequenceClassification(nli),
        "encoder": transformers.BertModel(bert, add_pooling_layer=False),
        "tagger": transformers.BertForTokenClassification(bert),
        "filler": transformers.BertForMaskedLM(bert),
        "gpt2": transformers.GPT2ForSequenceClassification(gpt2),
    }.items():
        network.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    unpadded = transformers.PreTrainedTokenizerFast.from_pretrained(root / "gpt2", pad_token=None, eos_token="[SEP]")
    unpadded.save_pretrained(root / "gpt2")
    vit = transformers.ViTConfig(
        image_size=32, patch_size=8, num_labels=3, id2label=SENTIMENTS, initializer_range=0.3, **SMALL
    )
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    yolos = transformers.YolosConfig(image_size=[32, 48], patch_size=8, num_detection_tokens=5, num_labels=3, **SMALL)
    transformers.YolosForObjectDetection(yolos).save_pretrained(root / "yolos")
    transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(root / "yolos")
    return root


@pytest.fixture
def table(folders):
    return lambda task, folder, extra="": (
        f'loader = "transformers"\ntask = "{task}"\nmodel = "{folders / folder}"\n{extra}\n'
    )


@pytest.fixture
def theirs(folders):
    """Transformers' own pipeline on one input at a time."""
    return lambda task, folder, **options: pipeline(task, model=str(folders / folder), device="cpu", **options)


def close(ours, wanted):
    """Equal, numbers up to the last bits, whatever they are nested in."""
    if isinstance(wanted, float):
        return ours == pytest.approx(wanted, abs=1e-5)
    if isinstance(wanted, dict):
        return ours.keys() == wanted.keys() and all(close(ours[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(ours) == len(wanted) and all(close(a, b) for a, b in zip(ours, wanted, strict=True))
    return ours == wanted


def test_a_text_is_classified_as_by_the_pipeline_alone_and_in_a_batch(hosted, predict, table, theirs):
    model = hosted(table("text-classification", "classifier"))
    pipe = theirs("text-classification", "classifier")
    wanted = [pipe(text, top_k=None) for text in TEXTS]
    wanted = [{**scores[0], "top": scores} for scores in wanted]
    assert close(predict(model, TEXTS), wanted)
    assert close([predict(model, [text])[0] for text in TEXTS], wanted)
    assert len({answer["score"] for answer in wanted}) == 3


def test_without_a_padding_token_only_texts_of_one_length_share_a_batch(hosted, predict, table, theirs):
    """Each ends with the end of text, which a classifier would take for padding if it were made to pad with that."""
    model = hosted(table("text-classification", "gpt2"))
    pipe = theirs("text-classification", "gpt2")
    texts = ["the quick fox", "the lazy dog", "a brown dog"]
    wanted = [pipe(text, top_k=None) for text in texts]
    wanted = [{**scores[0], "top": scores} for scores in wanted]
    assert close(predict(model, texts), wanted)
    assert close([predict(model, [text])[0] for text in texts], wanted)
    assert model.bucket(model.prepare("a fox", {})) != model.bucket(model.prepare(texts[0], {}))
    assert model.cost(model.prepare(texts[0], {})) == model.prepare(texts[0], {}).tokens > 1


def test_aliases_name_the_same_task_and_top_is_as_long_as_asked_for(hosted, predict, table):
    model = hosted(table("sentiment-analysis", "classifier", "top = 2"))
    assert len(predict(model, TEXTS)[0]["top"]) == 2
    assert len(predict(model, TEXTS, {"top_k": 1})[0]["top"]) == 1


def test_labels_of_the_model_file_take_the_place_of_the_model_s(hosted, opened, predict, table):
    plain = predict(hosted(table("text-classification", "classifier")), TEXTS[:1])[0]
    named = predict(hosted(table("text-classification", "classifier", 'labels = ["x", "y", "z"]')), TEXTS[:1])[0]
    assert "xyz"[list(SENTIMENTS.values()).index(plain["label"])] == named["label"]
    with pytest.raises(ModelFileError, match=r"labels = \['x'\]: 1 for 3 classes"):
        opened(table("text-classification", "classifier", 'labels = ["x"]')).load(torch.device("cpu"))
    with pytest.raises(ModelFileError, match=r"labels = .*only for text-classification and image-classification"):
        opened(table("feature-extraction", "encoder", 'labels = ["x"]')).load(torch.device("cpu"))


def test_features_of_a_text_are_its_own_tokens_whatever_it_was_padded_to(hosted, predict, table, theirs):
    model = hosted(table("feature-extraction", "encoder"))
    pipe = theirs("feature-extraction", "encoder")
    wanted = [pipe(text) for text in TEXTS]
    assert len({len(states[0]) for states in wanted}) == 3
    assert close(predict(model, TEXTS), wanted)
    assert close([predict(model, [text])[0] for text in TEXTS], wanted)


@pytest.mark.parametrize(
    ("task", "folder", "texts", "params"),
    [
        ("token-classification", "tagger", TEXTS, {"aggregation_strategy": "simple"}),
        ("fill-mask", "filler", ["the quick [MASK]", "a [MASK] jumps over the lazy dog"], {"top_k": 2}),
        ("zero-shot-classification", "nli", TEXTS, {"candidate_labels": ["animals", "poems"], "multi_label": True}),
    ],
)
def test_every_other_text_task_answers_as_its_pipeline(hosted, predict, table, theirs, task, folder, texts, params):
    in_toml = ", ".join(f"{name} = {json.dumps(value)}" for name, value in params.items())
    model = hosted(table(task, folder, f"params = {{ {in_toml} }}"))
    pipe = theirs(task, folder)
    wanted = json.loads(json.dumps([pipe(text, **params) for text in texts], default=float))
    answers = predict(model, texts)
    json.dumps(answers)
    assert close(answers, wanted)
    assert close([predict(model, [text])[0] for text in texts], wanted)


def test_an_image_is_classified_as_by_the_pipeline(hosted, predict, table, theirs, picture):
    images = [picture(size=(60, 40)), picture("JPEG", size=(90, 120), shift=50)]
    pipe = theirs("image-classification", "vit")
    wanted = [pipe(decode_image(image)) for image in images]
    wanted = [{**scores[0], "top": scores} for scores in wanted]
    model = hosted(table("image-classification", "vit"))
    assert close(predict(model, images), wanted)
    assert close([predict(model, [image])[0] for image in images], wanted)


def test_images_of_other_shapes_share_no_batch_where_the_processor_keeps_them(hosted, predict, table, theirs, picture):
    model = hosted(table("object-detection", "yolos", "params = { threshold = 0.0 }"))
    wide, tall = picture(size=(96, 64)), picture(size=(64, 96))
    assert model.bucket(model.prepare(wide, {})) != model.bucket(model.prepare(tall, {}))
    assert model.cost(model.prepare(wide, {})) >= 3 * 32 * 32
    pipe = theirs("object-detection", "yolos")
    for image in (wide, tall):
        assert close(predict(model, [image] * 2), [pipe(decode_image(image), threshold=0.0)] * 2)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (3, "takes text, not a int"),
        ("", "the text is empty"),
        (["a", "b"], "takes text, not a list"),
        ({"text": "a"}, "takes text, not a dict"),
        ("fox " * 60, "the text has 62 tokens, the model takes 40; shorten it, or let the parameter `truncation`"),
    ],
)
def test_what_is_no_text_the_model_can_take_is_the_caller_s_fault(hosted, table, value, why):
    with pytest.raises(InvalidInput, match=why):
        hosted(table("text-classification", "classifier")).prepare(value, {})


def test_a_text_without_a_mask_cannot_be_filled(hosted, table):
    with pytest.raises(InvalidInput, match="No mask_token"):
        hosted(table("fill-mask", "filler")).prepare("the quick fox", {})


def test_a_long_text_is_cut_off_when_that_is_asked_for(hosted, predict, table):
    model = hosted(table("text-classification", "classifier", "params = { truncation = true }"))
    assert predict(model, ["fox " * 60])[0]["label"] in SENTIMENTS.values()


def test_no_task_cuts_a_long_text_silently(hosted, predict, table, theirs):
    text = "fox " * 60
    zero_shot = hosted(table("zero-shot-classification", "nli", 'params = { candidate_labels = ["a"] }'))
    tagger = hosted(table("token-classification", "tagger", 'params = { aggregation_strategy = "simple" }'))
    for model in (zero_shot, tagger):
        with pytest.raises(InvalidInput, match=r"the text has 62 tokens, the model takes 40; shorten it$"):
            model.prepare(text, {})
    strides = {"stride": 4, "aggregation_strategy": "first"}
    pipe = theirs("token-classification", "tagger")
    pipe.tokenizer.model_max_length = 40  # nobody saved it, and the pipeline does not look at the network
    wanted = json.loads(json.dumps(pipe(text, **strides), default=float))
    assert close(predict(tagger, [text] * 2, strides), [wanted] * 2)


@pytest.mark.parametrize("value", ["https://example.com/cat.jpg", b"junk", ["x"]])
def test_what_is_no_image_is_the_caller_s_fault_and_nothing_is_downloaded(hosted, table, value):
    with pytest.raises(InvalidInput, match="image"):
        hosted(table("image-classification", "vit")).prepare(value, {})


@pytest.mark.parametrize(
    ("params", "why"),
    [
        (
            {"topk": 3},
            "unknown parameter 'topk'; text-classification takes top_k, function_to_apply, truncation, max_length",
        ),
        ({"top_k": 0}, "parameter top_k = 0: expected a whole number"),
        ({"top_k": "3"}, "parameter top_k = '3'"),
        ({"function_to_apply": "cosine"}, "parameters .*cosine"),
        ({"truncation": "sideways"}, "sideways"),
    ],
)
def test_parameters_are_checked(hosted, table, params, why):
    with pytest.raises(InvalidInput, match=why):
        hosted(table("text-classification", "classifier")).prepare("a fox", params)
    in_toml = ", ".join(f"{name} = {json.dumps(value)}" for name, value in params.items())
    with pytest.raises(ModelFileError, match=why):
        hosted(table("text-classification", "classifier", f"params = {{ {in_toml} }}"))


@pytest.mark.parametrize(
    ("task", "folder", "why"),
    [
        ("text-clasification", "classifier", "task = 'text-clasification': nograd serves text-generation, text-class"),
        ("automatic-speech-recognition", "classifier", "nograd serves"),
        ("text-classification", "encoder", "has no weights for bert.pooler.dense.bias, .*saved as BertModel"),
        ("text-classification", "vit", "model = '.*vit': .*tokenizer"),
        ("text-generation", "vit", "model = '.*vit': .*tokenizer"),
        ("image-classification", "classifier", "model = '.*classifier': .*"),
        ("image-classification", "yolos", r"a yolos model \(.*\) has no head for it"),
    ],
)
def test_a_task_that_the_model_is_not_made_for_stops_the_start(opened, table, task, folder, why):
    with pytest.raises(ModelFileError, match=rf"models.toml: \[it\] .*{why}") as caught:
        opened(table(task, folder)).load(torch.device("cpu"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("./nowhere", "no such folder: .*/nowhere"),
        ("models/deep/nowhere", "no such folder"),
        ("/nowhere", "no such folder: /nowhere"),
        ("someone/something", "there is no folder .*/someone/something; as a hub name: OSError: .*couldn't"),
        ("something", "there is no folder .*/something; as a hub name: OSError"),
    ],
)
@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_a_model_that_is_nowhere_is_named_in_one_line(opened, task, model, why):
    with pytest.raises(ModelFileError, match=rf"models.toml: \[it\] model = '{model}': {why}") as caught:
        opened(f'loader = "transformers"\ntask = "{task}"\nmodel = "{model}"').load(torch.device("cpu"))
    assert "\n" not in caught.value.message


def test_a_relative_folder_is_beside_the_model_file(hosted, predict, folders, tmp_path):
    (tmp_path / "mine").symlink_to(folders / "classifier")
    for model in ("mine", "./mine"):
        hosted(f'loader = "transformers"\ntask = "text-classification"\nmodel = "{model}"')


@pytest.mark.parametrize(("dtype", "alone"), [("bfloat16", True), ("float32", False)])
def test_who_is_loaded_alone_is_whoever_changes_torch_s_default_dtype_meanwhile(
    hosted, table, monkeypatch, dtype, alone
):
    seen, change = set(), torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda given: (seen.add(given), change(given)))
    model = hosted(table("text-classification", "classifier", f'dtype = "{dtype}"'))
    assert (seen - {torch.float32} != set()) == model.loads_alone == alone


def test_dropout_is_off_and_the_dtype_is_the_model_file_s(hosted, predict, table):
    model = hosted(table("text-classification", "classifier", 'dtype = "bfloat16"'))
    network = model._pipeline.model
    assert network.dtype == torch.bfloat16
    assert not any(part.training for part in network.modules())
    assert predict(model, TEXTS) == predict(model, TEXTS)


def test_prepared_inputs_survive_a_forward_so_that_a_batch_can_be_split_and_run_again(hosted, table):
    model = hosted(table("text-classification", "classifier"))
    prepared = [model.prepare(text, {}) for text in TEXTS]
    first = [model.finish(output, {}) for output in model.forward(prepared, {})]
    alone = [model.finish(model.forward([item], {})[0], {}) for item in prepared]
    again = [model.finish(output, {}) for output in model.forward(prepared, {})]
    assert close(alone, first)
    assert again == first


def test_keys_that_would_do_nothing_are_refused(opened, table):
    for extra, why in [
        ("shape = [3]", "a pipeline brings its own preprocessing"),
        ("transform = { resize = 3 }", "a pipeline brings its own preprocessing"),
        ('input = "rows"', "input = 'rows': loader 'transformers' takes text or image"),
    ]:
        with pytest.raises(ModelFileError, match=why):
            opened(table("text-classification", "classifier", extra)).load(torch.device("cpu"))


def test_padding_never_more_than_doubles_a_text():
    for length in range(1, 3000):
        same = (
            [other for other in range(1, 6000) if length_class(other) == length_class(length)]
            if length % 97 == 0
            else []
        )
        assert not same or max(same) <= max(32, 2 * min(same))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 1e-1)])
def test_scores_in_another_dtype_are_near(hosted, predict, table, dtype, tolerance):
    wanted = predict(hosted(table("text-classification", "classifier")), TEXTS)
    answers = predict(hosted(table("text-classification", "classifier", f'dtype = "{dtype}"')), TEXTS)
    for answer, one in zip(answers, wanted, strict=True):
        scores = {each["label"]: each["score"] for each in one["top"]}
        assert {each["label"]: each["score"] for each in answer["top"]} == pytest.approx(scores, abs=tolerance)
    json.dumps(answers)


def test_images_may_be_channels_last_and_texts_not(hosted, opened, predict, table, picture):
    images = [picture(), picture(shift=40)]
    wanted = predict(hosted(table("image-classification", "vit")), images)
    assert close(predict(hosted(table("image-classification", "vit", "channels_last = true")), images), wanted)
    with pytest.raises(ModelFileError, match="channels_last = True: only images have channels"):
        opened(table("text-classification", "classifier", "channels_last = true")).load(torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_network_takes_batches_and_texts_of_any_length_without_another_compilation(hosted, predict, table):
    eager = hosted(table("text-classification", "classifier"))
    model = hosted(table("text-classification", "classifier", "compile = true"))
    texts = ["a fox", "the quick brown fox", TEXTS[1], TEXTS[2]]
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (1, 2, 3, 4):
            assert close(predict(model, texts[:n]), predict(eager, texts[:n]))
