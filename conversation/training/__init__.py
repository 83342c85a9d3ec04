"""The loss of one step, and the run of all."""
