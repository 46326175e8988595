"""What a machine does to a training command, done to it on purpose."""
