"""What `gralora evaluate` measures: tasks of lm-evaluation-harness, and the loss on one's own data."""
