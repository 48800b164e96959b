"""Backfills as their owner sees them: `Client.backfill` makes one, `Client.backfill_at` finds one again.

`planning` measures and plans, `backfill` starts, follows, pauses, resumes, retries, cancels; `stages` are the backfill
and its retries; `status` is what it says of itself. Importing any of it imports none of the libraries a backfill needs.
"""
