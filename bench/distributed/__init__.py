"""Steps on several ranks beside those of DistributedDataParallel: the words that they move, and their time."""
