"""The nouns: all substance of the pipeline, one package per subject. Each imports only those before it in this list:
runtime, tokens, model, training, adaptation, codec, quantization, evaluation, certification, packing, reporting.
"""

import os

# OpenMP threads that wait by spinning take the cores from those they wait for: on a machine with anything else to do a
# training step was seen to take nine times as long. PyTorch reads this once, when it is imported, hence it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
