"""Methods that weigh losses without a look at gradients: one ordinary backward pass."""
