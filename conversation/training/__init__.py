"""Training: the loss and gradients of a step, and the run of all steps."""
