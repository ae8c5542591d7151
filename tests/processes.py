"""How long tests wait for the processes that they start."""

PATIENCE = 900  # seconds: a busy machine is slow, but a process that hangs must end
