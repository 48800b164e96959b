"""Our own app in a process to which the kernel refuses hard links (``celery -A unlinkable_app``)."""

import os
import platform

from nograd.tasks import app
from refusals import LINKS, refuse

refuse(*LINKS[platform.machine()])
try:
    os.link(__file__, f"{__file__}.link")
except PermissionError:
    pass
else:
    raise SystemExit("hard links are not refused")

__all__ = ["app"]
