"""Few-shot tasks, replayable views, and stored teacher outputs."""
