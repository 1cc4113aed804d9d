"""Losses in, ``.grad`` out: a step's surgery with ``.grad`` as its sink."""

from collections.abc import Sequence

from gradkern.aggregators import Aggregator
from gradkern.gradients.accumulation import Accumulation
from gradkern.gradients.features import Features
from gradkern.gradients.losses import Loss, Losses, Source
from gradkern.gradients.parameters import Groups, Params, Targets
from gradkern.gradients.sources import from_losses
from gradkern.info import SurgeryInfo
from gradkern.modifiers.suppression import Suppression
from gradkern.step.options import Options
from gradkern.step.pipeline import refuse_distributed, run
from gradkern.step.sinks import GradSink, Sink, WeightedBackwardSink


def backward(
    losses: Sequence[Loss],
    params: Params,
    *,
    aggregator: Aggregator,
    groups: Groups = "model",
    shared: Params | None = None,
    suppression: Suppression | None = None,
    features: Features | None = None,
    batched: bool = False,
    retain_graph: bool = False,
) -> SurgeryInfo:
    """Compute the gradient of each loss, combine them by ``aggregator``, and accumulate the result into ``.grad``.

    Surgery is for parameters that at least two losses reach. A parameter that one loss reaches gets that loss's
    gradient as it is, and one that no loss reaches keeps its ``.grad``. ``Sum``, ``Mean`` and ``Constant`` are no
    surgery: they are torch's own backward pass of the weighted sum of the losses.

    Args:
        losses: T entries, a task's position being its identity. Each is a tensor of one element, or a callable that
            returns one, or None for a task absent in this step. Callables run once each, in order, with gradients
            enabled, and each one's graph is freed before the next runs, so that one task's activations are alive at
            a time; what autocast they need goes inside them.
        params: a Module, tensors, or (name, tensor) pairs: leaf tensors on one device; float32, float64, bfloat16 or
            float16, also mixed. Those that do not require grad are passed over.
        aggregator: the method, such as ``gradkern.PCGrad()``.
        groups: what has a Gramian, and weights, of its own: "model", all parameters together; "parameter", each;
            "module", each owning module's; or a function from a parameter's name to its group.
        shared: the parameters under surgery, some of ``params`` in any of its forms, in place of those that two
            losses reach. All others get the plain sum.
        suppression: drops entries of the result at random, under any ``aggregator``; the shared parameters' alone.
        features: a tensor, or several, through which alone losses reach the parameters below: the output of a trunk
            that the tasks share in one forward pass. The heads then go back to it first, each one's graph freed before
            the next, callables' too, and the trunk once per task. They can have no tensor hooks, nor retain_grad().
        batched: with ``features``, send all tasks through the trunk in one vectorized pass, which is faster where a
            task's own is too small for the device. Its operations must have rules for :func:`torch.func.vmap`, and a
            tensor's hook there sees all tasks' gradients at once.
        retain_graph: keep the graphs for another backward pass.

    Returns:
        The step's losses, Gramian and weights, as tensors that stay on the device.

    Raises:
        TypeError, ValueError: an argument is not as said above, a loss reaches none of ``params``, a graph holds
            reentrant checkpointing, or torch.distributed runs on more than one rank. No ``.grad`` has changed then,
            nor if a callable or a tensor's hook raises; but if torch's own backward pass of a weighted sum of tensors
            fails halfway, ``.grad`` is as that leaves it. Post-accumulate hooks run when all else is done.
    """
    options = Options(aggregator, groups, shared, suppression)
    source = from_losses(losses, features, batched, retain_graph)
    return run(source, grad_sink(source, options), options, params)


def grad_sink(source: Source, options: Options) -> Sink:
    """Return the sink that leads to ``.grad``: torch's own backward pass where that is all there is to do."""
    if not options.needs_no_rows:
        return GradSink()
    assert isinstance(source, Losses), "sums of micro-batches have rows"
    return WeightedBackwardSink(source, options.aggregator)


def add_up(total: Accumulation, losses: Losses, params: Params) -> SurgeryInfo:
    """Add the task gradients of ``losses`` to ``total``, a source for a step to come."""
    refuse_distributed()
    targets = Targets.of(params, groups="model", shared=None)
    losses.open(targets.device)
    return total.add(losses, targets.tensors)
