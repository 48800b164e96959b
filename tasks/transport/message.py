"""From the bytes in a list to a kombu message, or to the reason why not."""

from __future__ import annotations

import codecs
from typing import Any

from kombu.transport import virtual

from .decode import is_kombus, loads
from .errors import Malformed
from .lease import Lease

#: header that says how often a worker died while the message was on its device or in preparation
DELIVERY_COUNT = "x-delivery-count"


class Envelope(dict):  # type: ignore[type-arg]
    """The decoded message, and the lease it came with."""

    lease: Lease | None = None


class Message(virtual.Message):  # type: ignore[misc]
    """A message whose delivery tag is its lease id: the published tag is the same on every redelivery."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **kwargs)
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise Malformed(f"no message can be made of it: {type(err).__name__}: {err}") from err
        self.lease: Lease | None = getattr(payload, "lease", None)
        if self.lease is not None:
            self.delivery_tag = self.lease.id

    def _decode(self) -> Any:
        """The body; kombu keeps what this returns."""
        accepted = self.accept is None or self.content_type in self.accept
        if accepted and isinstance(self.body, bytes) and is_kombus(self.content_type, self.content_encoding):
            try:
                return loads(self.body.decode("utf-8"))
            except ValueError:
                pass  # kombu wraps it in an error of its own
        return super()._decode()


def read(raw: bytes, lease: Lease | None) -> Envelope:
    """Decode a message and check what kombu and Celery will take for granted.

    Raises:
        Malformed: with the reason.
    """
    payload = _decode(raw)
    properties = _mapping(payload, "properties", required=True)
    headers = _mapping(payload, "headers")
    _mapping(properties, "delivery_info")
    if not isinstance(properties.get("delivery_tag"), str | int) or properties["delivery_tag"] == "":
        raise Malformed("no delivery tag in its properties")
    _check_encoding(payload)
    envelope = Envelope(payload)
    envelope.lease = lease
    if lease is not None:
        envelope["headers"] = headers | {DELIVERY_COUNT: max(0, lease.deliveries)}
        if lease.deliveries >= 0:
            envelope["headers"]["redelivered"] = True
            properties["delivery_info"]["redelivered"] = True
    return envelope


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        payload = loads(raw.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise Malformed(f"not UTF-8: {err}") from err
    except RecursionError as err:
        raise Malformed("nested too deeply") from err
    except (ValueError, TypeError) as err:
        raise Malformed(f"not JSON: {err}") from err
    if not isinstance(payload, dict):
        raise Malformed(f"a JSON {type(payload).__name__}, not an object")
    return payload


def _check_encoding(payload: dict[str, Any]) -> None:
    for name in ("content-encoding", "content-type"):
        if not isinstance(payload.get(name), str | None):
            raise Malformed(f"{name} is not a string")
    encoding = payload.get("content-encoding")
    if encoding and encoding.lower() not in {"utf-8", "binary", "ascii-8bit"}:
        try:
            codecs.lookup(encoding)
        except LookupError as err:
            raise Malformed(f"unknown content-encoding {encoding!r}") from err


def _mapping(payload: dict[str, Any], name: str, *, required: bool = False) -> dict[str, Any]:
    value = payload.get(name)
    if isinstance(value, dict):
        return value
    if value is None and not required:
        payload[name] = {}
        return payload[name]  # type: ignore[no-any-return]
    raise Malformed(f"{name} is {'missing' if value is None else 'not an object'}")
