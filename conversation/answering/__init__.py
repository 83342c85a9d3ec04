"""Questions to a model, and verdicts on its answers."""
