"""Evaluators: ways to score a network on a stream."""
