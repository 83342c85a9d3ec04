"""Tokens and weights."""
