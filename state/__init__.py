"""A run's files: what a checkpoint holds, how it is written and read, when, and what becomes of it afterwards."""
