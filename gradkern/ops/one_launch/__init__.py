"""The whole surgery of a step in one kernel launch."""
