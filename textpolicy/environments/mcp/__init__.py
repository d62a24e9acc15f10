"""Tools of MCP servers. The official client runs in one process, which is killed with the run."""
