"""Runs as they lie on disk: listed, compared, promoted, done again, judged, carried."""
