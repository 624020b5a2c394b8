"""Populations of small classifiers, and what detectors say about them."""
