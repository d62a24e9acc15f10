"""One paper a file: rewards to advantages, log-probabilities to a loss."""
