"""Speed and memory of GraLoRA beside the frozen base, PEFT's LoRA, PEFT's own GRALORA and Unsloth's functions.

    python -m benchmarks.speed linear model --out results.json

`__main__` has the command line, `layers` and `steps` what is measured, `methods` what is compared, `exact` the float64
reference without which no figure is printed, `timing` how time and memory are taken, `report` how they are shown.
"""
