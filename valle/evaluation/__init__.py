"""Evaluation: how good a model is, beside simple baselines and the codec's ceiling, and a report to listen to."""
