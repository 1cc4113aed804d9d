"""Small optimisation problems over tasks, solved for many Gramians at once on their device."""
