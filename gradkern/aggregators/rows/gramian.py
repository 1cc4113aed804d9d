"""The methods whose weights solve a small problem posed by the Gramian."""

from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.method import Laws, Method, Paper

SENER = Paper("Sener & Koltun", 2018, "Multi-Task Learning as Multi-Objective Optimization")

ROWS = (Method("mgda", MGDA, "mgda", SENER, Laws(zero_row="ignored")),)
