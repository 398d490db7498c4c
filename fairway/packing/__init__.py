"""From modules to one short program, step by step: link, fold, sweep, shorten."""
