"""What is asked of the system: requests in columns, readers of traces, generators, arrival processes."""
