"""Bringing teachers' vectors into spaces in which they can be learned: linear maps, fitted on a lake and kept in it."""
