"""The mocked machine: its time, its fabric, its memory, its faults and what each operator costs on it."""
