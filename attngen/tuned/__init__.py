"""Choices that were tuned on devices we had, one file for each; ``examples/shipped.py`` says how it is made.

A file is named as ``attngen info`` names its device. Entries count as those of the user's own cache do: only for the versions
of torch, Triton, attngen and its templates that they were made with.
"""
