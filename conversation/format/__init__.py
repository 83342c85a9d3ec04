"""The text format: what a model is trained on and what it answers."""
