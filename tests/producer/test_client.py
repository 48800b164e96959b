"""Submitting: what is checked before, what is sent, and what is said when it cannot be."""

import base64
import json
import socket
import time
import traceback
from contextlib import contextmanager

import pytest

from nograd.producer import Client
from nograd.producer.broker import Message, address_of, wire_size
from nograd.producer.embedded import EmbeddedRedis
from nograd.tasks import BrokerUnavailable, ConfigError, InvalidInput, ModelFileError, UnknownModel
from nograd.tasks.errors import ResultTimeout
from nograd.tasks.keys import BULK, PRIORITY_SUFFIXES
from waiting import until


def messages(redis, queue):
    """What stands in a queue: (headers, args, kwargs), oldest first."""
    raw = [json.loads(text) for text in redis.lrange(queue, 0, -1)]
    return [(m["headers"], *json.loads(base64.b64decode(m["body"]))[:2]) for m in reversed(raw)]


# -- priority ---------------------------------------------------------------------------------------------------------


def test_bulk_jobs_stand_in_a_list_of_their_own_behind_the_others_and_are_counted(client, redis):
    client.submit("echo", 1)
    client.submit("echo", 2, priority="bulk")
    client.submit_many("echo", [3, 4], priority="bulk")
    predictions = client.map("echo", [5, 6, 7], batch=1, priority="bulk", timeout=0.01)
    with pytest.raises(ResultTimeout):
        next(predictions)
    assert [args[1] for _, args, _ in messages(redis, "nograd.echo")] == [1]
    behind = f"nograd.echo{PRIORITY_SUFFIXES[-2]}"
    assert [args[1] for _, args, _ in messages(redis, behind)] == [2, 3, 4, [5], [6], [7]]
    properties = json.loads(redis.lindex(behind, 0))["properties"]
    assert properties["priority"] == BULK
    assert client.broker.waiting(["echo"]) == {"echo": 7}


def test_an_unknown_priority_is_refused_before_anything_is_sent(client, redis):
    for send in (
        lambda: client.submit("echo", 1, priority="urgent"),
        lambda: client.submit_many("echo", [1], priority=9),
        lambda: client.map("echo", [1], priority=None),
    ):
        with pytest.raises(ConfigError, match="expected 'interactive' or 'bulk'"):
            send()
    assert redis.exists("nograd.echo") == 0


# -- known models -----------------------------------------------------------------------------------------------------


def test_an_unknown_model_raises_at_once_naming_the_known_ones_and_the_closest(client, redis):
    with pytest.raises(UnknownModel, match=r"'ecko'\. Did you mean 'echo'\? Known models: echo, image, total"):
        client.submit("ecko", 1)
    with pytest.raises(UnknownModel):
        client.map("ecko", [1])  # before the first prediction is asked for
    assert redis.exists("nograd.ecko") == 0


def test_without_any_model_the_error_says_where_models_come_from(redis_url):
    with Client(redis_url) as client, pytest.raises(UnknownModel, match="NOGRAD_MODELS"):
        client.submit("echo", 1)


def test_a_model_of_the_model_file_is_known_without_redis_or_worker(tmp_path, redis_url, redis):
    file = tmp_path / "models.toml"
    file.write_text('[mine]\nloader = "module"\nclass = "nowhere:Model"\nweights = "none.pth"\ninput = "rows"\n')
    with Client(redis_url, models=file) as client:
        client.submit("mine", [1, 2])
        card = client.models()["mine"]
    assert (card.input, card.queue, card.seen_at) == ("rows", "nograd.mine", 0.0)
    assert redis.llen("nograd.mine") == 1


def test_the_model_file_and_the_registry_are_merged(tmp_path, client, redis_url):
    file = tmp_path / "models.toml"
    file.write_text('[echo]\nloader = "python"\nclass = "nowhere:Model"\ninput = "text"\n')
    with Client(redis_url, models=file) as both:
        cards = both.models()
    assert set(cards) == {"echo", "total", "image"}
    assert cards["echo"].input == "text"  # the file is believed
    assert cards["echo"].seen_at > 0  # and a worker was seen


def test_a_model_registered_a_moment_ago_is_known(client, register):
    with pytest.raises(UnknownModel):
        client.submit("late", 1)
    register(client, late="json")
    client.submit("late", 1)


def test_a_wrong_model_file_or_url_stops_the_client(tmp_path, redis_url):
    with pytest.raises(ModelFileError, match=r"absent\.toml"):
        Client(redis_url, models=tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="http"):
        Client("http://localhost")


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_a_job_is_one_celery_message_on_the_queue_of_its_model(client, redis):
    job = client.submit("echo", {"a": [1]}, params={"k": 2}, expires_s=60, task_id="mine")
    [(headers, args, kwargs)] = messages(redis, "nograd.echo")
    assert job.id == headers["id"] == headers["root_id"] == "mine"
    assert headers["task"] == "nograd.predict"
    assert args == ["echo", {"a": [1]}]
    assert kwargs == {"params": {"k": 2}}
    assert headers["expires"] is not None
    assert not headers["ignore_result"]


def test_logs_and_flower_see_a_description_and_never_the_input(client, redis, tmp_path):
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"secret" * 2048)
    client.submit("image", picture, params={"long": "x" * 1000})
    client.submit_many("image", [b"secret"])
    first, second = (headers for headers, _, _ in messages(redis, "nograd.image"))
    assert first["argsrepr"] == "image cat.jpg 12 KB"
    assert second["argsrepr"] == "image 6 B"
    assert len(first["kwargsrepr"]) <= 200


def test_submitting_subscribes_to_nothing(client, redis):
    jobs = [client.submit("echo", 1), *client.submit_many("echo", [1, 2, 3])]
    assert redis.pubsub_channels("celery-task-meta-*") == []
    assert len({job.id for job in jobs}) == 4


def test_many_jobs_travel_in_few_round_trips_and_in_order(client, redis):
    client.submit("echo", 0)  # connections are open
    redis.config_resetstat()
    before = redis.info("stats")["total_reads_processed"]
    jobs = client.submit_many("echo", list(range(2000)))
    reads = redis.info("stats")["total_reads_processed"] - before
    assert [args[1] for _, args, _ in messages(redis, "nograd.echo")][1:] == list(range(2000))
    assert [headers["id"] for headers, _, _ in messages(redis, "nograd.echo")][1:] == [job.id for job in jobs]
    assert reads < 500  # 4 pipelines of 1000 commands, read by Redis in some pieces; 4000 reads one by one


def test_a_pipeline_is_flushed_before_it_grows_large(client, redis):
    lengths = []

    def rows():
        for _ in range(10):
            lengths.append(redis.llen("nograd.image"))
            yield Message("image", {"base64": "x" * 1024**2}, "image")

    client.broker.publish_many(rows())
    assert lengths == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_a_list_with_one_bad_input_sends_nothing_and_names_it(client, redis):
    with pytest.raises(InvalidInput, match="input 2: "):
        client.submit_many("echo", [1, 2, object()])
    assert redis.llen("nograd.echo") == 0


def test_an_iterator_is_sent_by_chunks_as_it_is_read(client, redis):
    lengths = []

    def values():
        for value in range(2500):
            if value % 1000 == 0:
                lengths.append(redis.llen("nograd.echo"))
            yield value

    assert len(client.submit_many("echo", values())) == 2500
    assert lengths == [0, 1000, 2000]


@contextmanager
def refusing_writes(redis):
    """Redis without memory: it takes no more messages, but still passes on what is published to workers."""
    try:
        yield lambda: redis.config_set("maxmemory", "1")
    finally:
        redis.config_set("maxmemory", "0")


def values_until(count, then):
    for value in range(count + 1500):
        if value == count:
            then()
        yield value


def test_when_redis_refuses_later_chunks_the_earlier_jobs_are_revoked_and_counted(client, redis):
    with redis.pubsub() as listening, refusing_writes(redis) as refuse:
        listening.psubscribe("*pidbox*")
        with pytest.raises(BrokerUnavailable, match="; 2000 jobs had been accepted before, and the workers were told"):
            client.submit_many("echo", values_until(2500, refuse))
        heard = until(lambda: (one := listening.get_message(timeout=1)) and one["type"] == "pmessage" and one)
        control = json.loads(base64.b64decode(json.loads(heard["data"])["body"]))
        sent = [headers["id"] for headers, _, _ in messages(redis, "nograd.echo")]
    assert len(sent) == 2000
    assert control["method"] == "revoke"
    assert set(control["arguments"]["task_id"]) >= set(sent)


def test_when_redis_dies_in_a_later_chunk_the_error_counts_the_jobs_it_had_accepted(register):
    with EmbeddedRedis() as server, Client(server.url) as client:
        register(client, echo="json")
        with pytest.raises(BrokerUnavailable, match="; 1000 jobs had been accepted before, and could not be revoked"):
            client.submit_many("echo", values_until(1500, server.stop))


def test_a_bad_input_in_a_later_chunk_is_named_also_when_the_earlier_jobs_cannot_be_revoked(register):
    def values(server):
        yield from range(1500)
        server.stop()
        yield object()

    with EmbeddedRedis() as server, Client(server.url) as client:
        register(client, echo="json")
        with pytest.raises(InvalidInput, match="input 1500: "):
            client.submit_many("echo", values(server))


def test_one_string_is_not_many_inputs(client):
    with pytest.raises(InvalidInput, match="one str"):
        client.submit_many("echo", "abc")
    with pytest.raises(InvalidInput, match="one str"):
        client.map("echo", "abc")


def test_what_the_broker_would_drop_is_refused(client):
    with pytest.raises(InvalidInput, match="__type__"):
        client.submit("echo", {"__type__": "x", "__value__": 1})


@pytest.mark.parametrize(
    "wire", ["x" * 5000, {"base64": "x" * 5000}, [1.25] * 500, [[1.5] * 100] * 5, {"a": [1.5] * 500}]
)
def test_the_estimated_size_of_an_input_is_about_right(wire):
    assert 0.3 < len(json.dumps(wire)) / wire_size(wire) < 3


def test_the_redis_of_the_host_program_s_own_celery_is_not_ours(redis_url, redis, monkeypatch, register):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://127.0.0.1:1/0")
    with Client(redis_url) as client:
        register(client, echo="json")
        job = client.submit("echo", 1)
        client.submit_many("echo", [2, 3])
        assert redis.llen("nograd.echo") == 3
        assert job.state == "PENDING"
        job.cancel()


def test_parameters_that_cannot_be_sent_are_refused_before_anything_is_sent(client, redis):
    for call in (client.submit, client.submit_many, client.map):
        with pytest.raises(InvalidInput, match=r"params: input\.k: a builtins\.object"):
            call("echo", [1], params={"k": object()})
    assert redis.llen("nograd.echo") == 0


# -- Redis away -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return f"redis://:secret@127.0.0.1:{port}/0", port


def test_without_redis_every_call_says_so_within_seconds_and_never_the_password(tmp_path, nobody):
    url, port = nobody
    file = tmp_path / "models.toml"
    file.write_text('[mine]\nloader = "python"\nclass = "nowhere:Model"\n')
    with Client(url, models=file) as client:
        job = client.job("x", "mine")
        calls = [
            lambda: client.submit("mine", 1),
            lambda: client.submit_many("mine", [1, 2]),
            lambda: client.submit("other", 1),
            lambda: next(client.map("mine", [1])),
            client.models,
            lambda: job.state,
            lambda: job.result(30),
            job.result,
            job.cancel,
            job.forget,
        ]
        refused = rf"no Redis at 127.0.0.1:{port} \(connection refused\): start one with `nograd up"
        for call in calls:
            started = time.monotonic()
            with pytest.raises(BrokerUnavailable, match=refused) as error:
                call()
            shown = "".join(traceback.format_exception(error.value))
            assert shown.count("Traceback") == 1  # not those of three libraries as well
            assert "secret" not in str(error.value)
            assert time.monotonic() - started < 20  # a result was waited for, for 30 s and for ever


def test_a_wrong_password_is_told_without_repeating_it(redis_server):
    address = f"127.0.0.1:{redis_server.port}"
    with Client(f"redis://:wrong@{address}/0") as client, pytest.raises(BrokerUnavailable, match=address) as error:
        client.models()
    assert "wrong@" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://user:pw@host:1234/0", "host:1234"),
        ("redis://host", "host:6379"),
        ("redis+socket:///run/redis.sock", "/run/redis.sock"),
        ("sentinel://:pw@a:26379;sentinel://:pw@b:26379", "a:26379, b:26379"),
    ],
)
def test_an_address_never_holds_the_password(url, address):
    assert address_of(url) == address


def test_a_closed_client_waits_for_nothing(redis_url):
    client = Client(redis_url)
    job = client.job("x")
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        job.result(1)


def test_the_default_client_is_that_of_the_environment():
    from nograd.tasks import app

    client = Client()
    assert client.app is app
    client.close()


def test_one_client_serves_many_threads(client, redis):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda value: client.submit("echo", value), range(200)))
    assert redis.llen("nograd.echo") == 200
    assert len({job.id for job in jobs}) == 200
    assert sorted(args[1] for _, args, _ in messages(redis, "nograd.echo")) == list(range(200))
