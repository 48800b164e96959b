"""The worker runtime: the pool, the models, the devices. The only part that imports torch."""

import os

# Before torch loads OpenMP, which reads it once: by default its threads spin after each operator, waiting for the next,
# and take from the interpreter the cores that prepare inputs and settle results. See `resources`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
