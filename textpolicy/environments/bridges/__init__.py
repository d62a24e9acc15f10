"""Environments of other libraries; each is imported when one of its names is asked for."""
