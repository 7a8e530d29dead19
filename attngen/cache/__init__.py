"""Choices that were measured, kept for the next time: in the user's cache, in files to pass on, and in those shipped."""
