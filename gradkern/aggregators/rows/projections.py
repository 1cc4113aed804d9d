"""The methods in which each task's gradient is projected onto others'."""

from typing import Any

from gradkern.aggregators.gradvac import GradVac
from gradkern.aggregators.method import Laws, Method, Paper
from gradkern.aggregators.pcgrad import PCGrad

PCGRAD = Paper("Yu et al.", 2020, "Gradient Surgery for Multi-Task Learning")
PARTNERS = Paper(None, None, "Rhapsody on a Theme of Gradient Surgery")
GRADVAC = Paper("Wang et al.", 2021, "Gradient Vaccine: Investigating and Improving Multi-task Optimization")
LAWS = Laws(no_conflict="sum", zero_row="ignored")


def _pcgrad(name: str, partner: str, paper: Paper, **more: Any) -> Method:
    """Return the row of PCGrad with one kind of partner."""
    return Method(name, PCGrad, "pcgrad_update", paper, LAWS, {"partner": partner}, **more)


ROWS = (
    _pcgrad("pcgrad", "all", PCGRAD, draws="order"),
    _pcgrad("pcgrad-random", "random", PARTNERS, draws="order"),
    _pcgrad("pcgrad-average", "average", PARTNERS),
    _pcgrad("pcgrad-similar", "most_similar", PARTNERS),
    _pcgrad("pcgrad-different", "most_different", PARTNERS),
    Method("gradvac", GradVac, "gradvac_updates", GRADVAC, LAWS, draws="order", state=True),
)
