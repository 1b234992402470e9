"""How `gralora tune` finds the settings to train with."""
