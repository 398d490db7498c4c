"""The track of the challenge that records are made for: its name, and what it limits.

The limits are those of the challenge's rules. Seconds are those of its own machine, eight H100. They are no settings,
because no run can choose them; a run can only set itself a lower cap (size_check.cap_bytes of params.yaml).
"""

TRACK = "track_10min_16mb"
# Bytes of code and compressed model together.
CAP_BYTES = 16_000_000
# Seconds of training, with everything else that reads training text; and seconds of one evaluation.
TRAIN_S = EVAL_S = 600.0
