"""Fast forms of what a frozen base model computes while adapters are trained over it."""
