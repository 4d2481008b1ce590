"""Estimates of steps and operators as plain data, for the command line and for tables."""
