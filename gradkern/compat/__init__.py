"""Other libraries' interfaces on this back end: change the import, keep the code."""
