"""A model that is asked."""
