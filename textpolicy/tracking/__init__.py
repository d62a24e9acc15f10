"""What a run reports: names, files, terminals and services."""
