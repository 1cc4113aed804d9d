"""The interfaces of other libraries, computed by gradkern. Only the import changes; the code stays."""
