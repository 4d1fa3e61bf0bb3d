"""Scenarios, one file per subject."""
