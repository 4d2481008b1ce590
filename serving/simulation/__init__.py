"""Runs in virtual time at full size: what drives them, what they give, how it is shown and searched."""
