"""Accuracy on held-out problems, asked through the OpenAI-compatible endpoint."""
