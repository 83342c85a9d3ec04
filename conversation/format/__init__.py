"""The text that a model is trained on and says."""
