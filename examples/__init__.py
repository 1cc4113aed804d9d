"""Programs that use gradkern."""
