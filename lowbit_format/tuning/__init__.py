"""Tuning a task with one call: data in a file, a base, and out comes a bundle."""
