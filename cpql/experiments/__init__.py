"""Finished runs beside one another: what their folders hold, and statistics over tasks and seeds."""
