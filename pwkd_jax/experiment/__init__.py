"""One experiment: what it is made of, its teachers and students, its directory on disk, and sweeps of many."""
