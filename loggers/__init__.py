"""What is said of a run while it goes on: running means, the progress bar, log.txt."""
