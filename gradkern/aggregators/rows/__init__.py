"""The rows of METHODS, a file for each family of methods."""
