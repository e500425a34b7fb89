"""The process that runs a job where the provider put it."""
