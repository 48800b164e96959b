"""Backfills: score millions of rows, exactly once in storage. Storage is the truth; Redis holds only hints.

At-least-once execution and idempotent commits that never replace one another give exactly-once *committed output*:

1. `sources` list and index the inputs; `draft` cuts their rows into chunks and makes the `plan`, written once.
2. Whoever runs a chunk reads its rows (`sources.open_reader`), scores them, and collects predictions and failed rows in
   an `output.PartWriter`.
3. `commit.commit` makes them part of the output, unless another attempt was first.
4. `progress` tells how far it is from the commit records alone; `finalize` closes the output; `verify` checks it.

The base install has none of the libraries this needs: ``pip install '.[backfill]'``.
"""
