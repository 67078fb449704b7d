"""Rows of files, the examples they hold, and what can be checked about them without a model. Light: no torch, no numpy."""
