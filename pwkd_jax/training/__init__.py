"""Training: the state, the one loop, the teacher's and the student's step, checkpoints, metrics and sharding."""
