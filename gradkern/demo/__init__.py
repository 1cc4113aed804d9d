"""``gradkern demo``: methods compared on pairs of overlaid digits, three tasks over one trunk."""
