"""The nouns: all substance of the pipeline, one package per subject. Each imports only those before it in this list:
runtime, tokens, model, training, adaptation, codec, quantization, evaluation, decoding, certification, packing,
reporting.
"""

import os

# OpenMP's threads wait for one another by spinning, unless told otherwise, and so keep processors from those that they
# wait for: on a machine with other work a training step was seen to take nine times as long. PyTorch reads this
# variable once, when it is imported, so it is set here, before any module of the project imports PyTorch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
