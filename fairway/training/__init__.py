"""Training: loop, clock and schedules, Muon, AdamW, gradients, averages of the weights, quantization-aware training."""
