"""What the measurements share: a Redis and real workers, hosted models, statistics."""
