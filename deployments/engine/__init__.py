"""A served model, from its queue to its verdict: batches, passes, counters."""
