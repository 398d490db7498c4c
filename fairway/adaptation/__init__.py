"""Training that goes on after training, on rows or documents: what adapt, TTT and LoRA TTT share."""
