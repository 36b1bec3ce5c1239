"""Answers and scores of a model: a run, an adapter, an export or any model folder."""
