"""Shipped configurations: runs (`laptop`, ...) and the parts they include (`model/`, `hardware/`)."""
