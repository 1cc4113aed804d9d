"""The reports' experiment from end to end: one BERT encoder, three heads, and the methods that train them."""
