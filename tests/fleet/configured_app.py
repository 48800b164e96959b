"""Our own app, set up as a user might (``celery -A configured_app``): ``TEST_CONF`` is JSON of Celery settings."""

import json
import os

from nograd.tasks import app

app.conf.update(json.loads(os.environ.get("TEST_CONF", "{}")))
