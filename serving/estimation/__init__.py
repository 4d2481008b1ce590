"""What the modeled machine takes for a step, an operator, a transfer; held against what was published about it."""
