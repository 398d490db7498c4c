"""Certificates: whether a score is the length of a code that can be decoded."""
