"""Answering tables with Spark: steps/score.py is the door."""
