"""``gradkern demo`` compares methods on pairs of overlaid digits, with three tasks over one trunk."""
