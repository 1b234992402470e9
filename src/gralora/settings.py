"""What GraLoRA's own settings do, for the config, for flags, and for help that is printed without importing torch."""

HELP = {
    "use_gralora": "Train GraLoRA instead of plain LoRA.",
    "gralora_k": (
        "Blocks per side of the grid; must divide r - hybrid_r and the input and output features of every "
        "targeted layer. 'auto': for each layer 2 below rank 64, 4 from there on, or the nearest smaller "
        "number that divides; the numbers chosen are in the model's own peft_config, and get saved."
    ),
    "hybrid_r": "Part of the rank r that is plain LoRA, 0 <= hybrid_r < r (Hybrid GraLoRA).",
    "gralora_scaling": (
        "Factor on the update. 'lora': lora_alpha / r, as in LoRA (lora_alpha / sqrt(r) with use_rslora). "
        "'matched': that times sqrt(r / (hybrid_r + (r - hybrid_r) / gralora_k)), since fewer ranks meet in "
        "one entry of the update than in LoRA's; docs/gralora.md derives it."
    ),
}
