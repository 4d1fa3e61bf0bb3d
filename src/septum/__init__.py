"""Septum: a TDX host you can take apart."""

__version__ = "0.1.0"
