"""The version of this code, as recorded in everything it writes."""

VERSION = "0.1.0"
