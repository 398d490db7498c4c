"""Stage size_check."""
