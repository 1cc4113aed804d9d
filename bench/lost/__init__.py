"""The share of the surgery by exact rows that sketches and features lose, while models train."""
