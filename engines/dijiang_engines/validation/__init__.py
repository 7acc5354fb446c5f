"""Replaying recorded cases on a runner, and judging what comes out."""
