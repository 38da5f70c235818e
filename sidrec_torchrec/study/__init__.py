"""Comparisons of arms: the steps of a study in one folder, what is compared, and the report."""
