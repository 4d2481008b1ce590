"""Training of the mini R1 on generated problems. Nothing that serves imports this package."""
