"""Needs a package that is nowhere."""

import package_that_is_nowhere as nowhere

Tasks = nowhere.Tasks

__all__ = ["Tasks"]
