"""From weights to integer codes: clips, Hessians and their calibration text, GPTQ, LQER, the search for a size."""
