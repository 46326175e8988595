"""What training leaves behind: the summary, its text table, pictures and page. Nothing here needs JAX."""
