"""What `gralora finetune` adds to the Trainer: several processes, progress, going on from checkpoints, the report."""
