"""``nograd models``."""

from __future__ import annotations

import time

import msgspec
from rich.table import Table

from .common import Run, command


@command
def models(run: Run) -> int:
    """List the models that are known: those of the model file and those workers have registered."""
    with run.client() as client:
        cards = client.models()
    table = Table("model", "loader", "input", "queue", "batch", "version", "seen")
    for card in cards.values():
        seen = f"{time.time() - card.seen_at:.0f} s ago" if card.seen_at else "in the file only"
        table.add_row(card.name, card.loader, card.input, card.queue, str(card.max_items), card.version, seen)
    empty = "no model is known: give --models FILE, or start a worker"
    run.emit({"models": [msgspec.to_builtins(card) for card in cards.values()]}, table if cards else empty)
    return 0
