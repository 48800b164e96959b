"""What a worker of the app consumes and how much it may hold."""

import pytest

from nograd.tasks.celery import BATCHES_IN_FLIGHT, MIN_IN_FLIGHT, configure_worker, create_app
from nograd.tasks.settings import Settings


@pytest.fixture
def held(tmp_path):
    """The messages in flight of a worker started so, with a model of 4,096 and one of 64 items a batch."""
    models = tmp_path / "models.toml"
    table = '[{0}]\nloader = "python"\nclass = "code:Model"\nbatch = {{ max_items = {1} }}\n'
    models.write_text(table.format("table", 4096) + table.format("small", 64) + table.format("single", 1))
    settings = Settings(models=models)

    def configure(**options):
        with create_app(settings) as app:
            configure_worker(app, settings, **options)
            return app.conf.worker_concurrency

    return configure


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, BATCHES_IN_FLIGHT * 4096),
        ({"queues": ["nograd.small", "nograd.single"]}, BATCHES_IN_FLIGHT * 64),
        ({"queues": "nograd.small,nograd.single"}, BATCHES_IN_FLIGHT * 64),
        ({"queues": "nograd.small, nograd.single "}, BATCHES_IN_FLIGHT * 64),
        ({"queues": ["nograd.single"]}, MIN_IN_FLIGHT),
        ({"queues": ["celery"]}, MIN_IN_FLIGHT),
    ],
)
def test_a_worker_holds_four_batches_of_the_models_it_hosts(held, options, expected):
    assert held(**options) == expected


def test_who_starts_it_may_choose(held):
    assert not held(concurrency=7)  # left to Celery, which has the number from the command line
