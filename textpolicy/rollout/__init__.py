"""Workers: tasks and a policy in, scored groups out."""
