"""Presets, read with `importlib.resources`."""
