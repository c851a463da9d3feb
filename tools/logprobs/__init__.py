"""What a teacher says of a run's rows, for objective=distil."""
