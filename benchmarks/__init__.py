"""Figures with the command that makes them."""
