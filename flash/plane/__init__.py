"""The control plane as a library: run records, their state machine, supervision."""
