"""Backfills as their owner sees them: `Client.backfill` makes one, `Client.backfill_at` finds one again.

`planning` measures and plans, `backfill` starts, follows, pauses, resumes, cancels; `status` is what it says of itself,
`failures` are its failed rows. Importing any of it imports none of the libraries a backfill needs.
"""
