"""All commands under one name."""

from __future__ import annotations

import click

from .backfill import backfill
from .dead import dead
from .demo import demo
from .fleet import flower, status, up, worker
from .jobs import cancel, result, submit
from .models import models


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nograd")
def cli() -> None:
    """Asynchronous inference workers for PyTorch models, on Celery and Redis."""


for command in (up, worker, models, submit, result, cancel, backfill, status, dead, flower, demo):
    cli.add_command(command)
