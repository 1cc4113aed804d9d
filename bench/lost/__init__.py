"""What sketches and surgery through features lose of the surgery by exact rows, while models train."""
