"""The models a fleet knows: what workers tell and clients ask, kept in Redis.

Laws: a model stays known for days after its last worker has gone, so that a job can be queued while no worker is up;
a card that no worker renews is forgotten; a card that cannot be read (written by another version) is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from .keys import MODELS_KEY, MODELS_TTL_S, queue_name
from .modelfile import AnySpec, InputKind
from .structs import decodable


@decodable
class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may know of a model.

    Attributes:
        name: the model.
        loader: which loader serves it.
        input: what one input is.
        queue: where its jobs go.
        max_items: inputs in one forward.
        version: fingerprint of what answers (`nograd.workers.models.version`); empty from a model file. While workers
            serve different versions, that of the one that renewed its card last.
        seen_at: when a worker last renewed the card, seconds since the epoch; 0 from a model file.
    """

    name: str
    loader: str
    input: InputKind
    queue: str
    max_items: int
    version: str = ""
    seen_at: float = 0.0

    @classmethod
    def of(cls, name: str, spec: AnySpec, *, version: str = "") -> ModelCard:
        """The card of a model of a model file."""
        return cls(
            name=name,
            loader=spec.loader,
            input=spec.kind,
            queue=queue_name(name),
            max_items=spec.batch.max_items,
            version=version,
        )


def register(redis: Any, cards: Iterable[ModelCard]) -> None:
    """Make models known, or renew them; forget those nobody renewed for `keys.MODELS_TTL_S`."""
    now = time.time()
    fields = {card.name: msgspec.json.encode(msgspec.structs.replace(card, seen_at=now)) for card in cards}
    if not fields:
        return
    stale = [name for name, card in known(redis).items() if now - card.seen_at > MODELS_TTL_S]
    pipe = redis.pipeline()
    pipe.hset(MODELS_KEY, mapping=fields)
    if stale:
        pipe.hdel(MODELS_KEY, *stale)
    pipe.expire(MODELS_KEY, MODELS_TTL_S)
    pipe.execute()


def known(redis: Any) -> dict[str, ModelCard]:
    """All models workers have registered, by name."""
    cards = {}
    for raw in redis.hgetall(MODELS_KEY).values():
        try:
            card = msgspec.json.decode(raw, type=ModelCard)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        cards[card.name] = card
    return cards
