"""A backfill on a worker: one chunk at a time through the same device thread as online jobs, which go first.

::

    runner ──► scoring ──────────────────────────► runner ──► commit, top up
               read, prepare ─► block ─► device      PartWriter

`runner` takes a chunk from its claim to its commit, `attempt` holds it meanwhile; `scoring` turns its rows into
predictions; a `block` is a batch of rows on its way over the device; `suspects` finds the row that kills workers.
A `lookout` keeps going what lost its messages.
"""
