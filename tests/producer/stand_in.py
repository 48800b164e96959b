"""A stock Celery worker that answers `nograd.predict` without torch, so that tests of the client start in a second.

Started by `conftest.stand_in`. What a model does is in its name; each counts what it is given.
"""

from celery.signals import worker_ready
from kombu import Queue

from nograd.tasks import Settings, create_app, registry
from nograd.tasks.errors import InvalidInput, ModelFailed
from nograd.tasks.payloads import decode_input
from waiting import stand_at

app = create_app(Settings.from_env())
app.conf.worker_pool = None
app.conf.worker_consumer = "celery.worker.consumer:Consumer"
app.conf.worker_concurrency = 8
app.finalize()
app.tasks.unregister("nograd.predict")  # nograd's own, which runs in nograd's pool only


def echo(value, params):
    return {"echo": value, "params": params} if params else value


def image(value, params):
    return {"bytes": len(decode_input(value))}


def total(value, params):
    if not all(isinstance(number, int | float) for number in value):
        raise InvalidInput("rows are numbers")
    return sum(value)


def waits(value, params):
    if value is not None:
        stand_at(value)
    return value


def fails(value, params):
    raise {"typed": ModelFailed("it broke"), "foreign": ZeroDivisionError("division by zero")}[value]


MODELS = {
    "echo": (echo, "json"),
    "image": (image, "image"),
    "total": (total, "rows"),
    "waits": (waits, "json"),
    "fails": (fails, "json"),
}
app.conf.task_queues = [Queue(f"nograd.{name}", routing_key=f"nograd.{name}") for name in MODELS]


@app.task(name="nograd.predict")
def predict(model, input, params=None, many=False):  # noqa: A002 - the word of the contract
    run = MODELS[model][0]
    return [one(run, item, params) for item in input] if many else run(input, params)


def one(run, item, params):
    try:
        return {"prediction": run(item, params)}
    except (InvalidInput, ModelFailed) as err:
        return {"error": {"type": type(err).__name__, "code": err.code, "message": err.message}}


@worker_ready.connect
def register(**_):
    cards = [
        registry.ModelCard(name=name, loader="python", input=kind, queue=f"nograd.{name}", max_items=16)
        for name, (_, kind) in MODELS.items()
    ]
    registry.register(app.backend.client, cards)
