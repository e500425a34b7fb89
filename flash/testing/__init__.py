"""The kit for plugin authors: real but tiny things to test against."""
