"""Estimates of steps, operators and transfers as plain data, for the command line and for tables."""
