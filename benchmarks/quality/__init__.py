"""Quality of GraLoRA beside LoRA at equal trainable parameters, each method at its own best learning rate.

    python -m benchmarks.quality --tiny

`__main__` has the command line, `data` makes the tasks, `plan` says what is run, `runs` runs it in several processes,
`train` and `generate` are one run, `stats` are the comparisons, `report` and `figures` what the documentation shows.
"""
