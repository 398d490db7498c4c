"""The stages of the pipeline, in the order of the DAG: fetch, tokenize, train, average, adapt, quantize, compress,
size_check, evaluate, certify, report, submission."""

import os

# OpenMP threads that wait by spinning take the cores from those they wait for: on a machine with anything else to do a
# training step was seen to take nine times as long. Read once, when PyTorch is imported, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
