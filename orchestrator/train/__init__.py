"""The one training loop, in one process or under DDP."""
