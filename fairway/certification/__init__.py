"""Stage certify."""
