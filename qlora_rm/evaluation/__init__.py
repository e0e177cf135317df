"""Evaluation: agreement of scores with preferences, with confidence intervals, and scored rows."""
