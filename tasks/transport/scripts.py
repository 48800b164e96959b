"""The Lua scripts: files of their own, each with the law it keeps on top."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Script:
    """One script, and the name Redis knows it by once it has been loaded."""

    source: str
    sha: str

    @classmethod
    def read(cls, name: str) -> Script:
        """The script in ``name.lua`` beside this module."""
        source = Path(__file__).with_name(f"{name}.lua").read_text(encoding="utf-8")
        return cls(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())

    def call(self, keys: list[str], args: list[str | bytes | int]) -> tuple[str | bytes | int, ...]:
        """The command that runs the script if Redis has it (NOSCRIPT otherwise, and nothing was done)."""
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


FETCH = Script.read("fetch")
ACK = Script.read("ack")
GIVE_BACK = Script.read("give_back")
BURY = Script.read("bury")
BEAT = Script.read("beat")
PUSH = Script.read("push")
RING = Script.read("ring")

ALL = (FETCH, ACK, GIVE_BACK, BURY, BEAT, PUSH, RING)
