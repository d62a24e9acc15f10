"""Exporting what was trained: other formats, each shown to compute what was trained."""
