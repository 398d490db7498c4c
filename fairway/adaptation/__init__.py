"""Stage adapt."""
