"""What to adapt and how: rules, the modules they choose, and the JSON forms of a config."""
