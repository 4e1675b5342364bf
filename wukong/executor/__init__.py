"""What runs tasks: the executor's state machine, its driver, and the pools that host it."""
