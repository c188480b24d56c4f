"""Adapters at work: over HTTP, and on the terminal."""
