"""Speeds, each printed as a ratio of two things measured in one run."""
