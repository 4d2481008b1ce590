"""Decisions of the serving system as pure code: numpy and stdlib only, time and chance as arguments."""
