"""Runs in the other interpreter, which finds these modules by this folder and not as a package."""
