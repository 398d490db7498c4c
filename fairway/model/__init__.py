"""The network: its config, modules and kernels, and the context that says how a forward pass runs."""
