"""A step's surgery from losses to ``.grad``."""

from collections.abc import Sequence

from gradkern.aggregators import Aggregator, Scalarization
from gradkern.distributed.comm import ProcessGroup, comm_of
from gradkern.gradients.accumulation import Accumulation
from gradkern.gradients.features import Features
from gradkern.gradients.losses import Loss, Losses, Source
from gradkern.gradients.parameters import Groups, Params, Targets
from gradkern.gradients.sources import from_losses
from gradkern.info import SurgeryInfo
from gradkern.modifiers.sketch import Sketch
from gradkern.modifiers.suppression import Suppression
from gradkern.step.mean_backward import MeanBackwardSink
from gradkern.step.options import Options
from gradkern.step.pipeline import open_source, outside_inference_mode, run
from gradkern.step.sinks import GradSink, Sink, WeightedBackwardSink
from gradkern.step.way import Way
from gradkern.step.weighted_pass import MeanWeightedPassSink, WeightedPassSink


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
    second: Sequence[Loss] | None = None,
    process_group: ProcessGroup | bool | None = None,
    through: str = "rows",
    finish: str = "backward",
    gramian: Sketch | None = None,
    per_example: bool = False,
) -> SurgeryInfo:
    """Compute the gradient of each loss, combine them by ``aggregator``, and accumulate the result into ``.grad``.

    Surgery is for parameters that at least two losses reach. A parameter that one loss reaches gets that loss's
    gradient unchanged, and one that no loss reaches keeps its ``.grad``. Methods that
    weigh losses, such as ``Sum`` and ``Uncertainty``, do no surgery: they run torch's own backward pass of the weighted
    sum of the losses. ``GeometricMean``, ``STCH`` and ``FAMO`` run all callables before it, and the graphs of all tasks
    are alive then.

    A parameter counts as shared as a whole. A tensor that holds weights of all tasks, such as log-variances or one wide
    head, must be left out of ``shared``, or be split into a tensor for each task.

    Args:
        losses: T entries in an order, such as a list; a task is identified by its position. Each is a dense floating
            tensor of one element, or a callable that returns one, or None for a task absent in this step. Callables run
            once each, in order, with gradients enabled. Each one's graph is freed before the next runs, so that only
            one task's activations are alive at a time. So each needs a forward pass of its own. A callable may switch
            ``requires_grad``: its task trains what requires grad when it returns. Callables enter autocast themselves
            if they need it.
        params: a Module, tensors, or (name, tensor) pairs: dense leaf tensors on one device; float32, float64,
            bfloat16, float16, complex64 or complex128, also mixed. Complex gradients count as pairs of real numbers. On
            several ranks they may be DTensors. Names are distinct. Those that do not require grad are skipped, and so
            are lazy ones without a shape.
        aggregator: the method, such as ``gradkern.PCGrad()``.
        groups: the groups of parameters, each with its own Gramian and weights: "model", one group of all parameters;
            "parameter", one group for each; "module", one group for each module that owns parameters; or a function
            from a parameter's name to its group.
        shared: the parameters under surgery, one or more of ``params`` in any of its forms, in place of those that two
            losses reach. All others get the sum of their gradients. An iterator serves one call.
        suppression: drops entries of the shared parameters' results at random, with any ``aggregator``.
        features: the output of a trunk that the tasks share in one forward pass: a tensor, or several. Losses must
            reach the trunk's parameters only through it. The backward passes of the heads run first, and each frees
            its graph, a callable's too, before the next; then the trunk runs once per task, and with
            ``through="features"`` once in all. Features must have no tensor hooks and no retain_grad(). Those that do
            not require grad are ignored. What is computed from another of the features counts as part of the heads.
        batched: with ``features``, send all tasks through the trunk in one vectorized pass, which is faster if one
            task's pass is too small for the device. The trunk's operations must have rules for
            :func:`torch.func.vmap`, so it must not be compiled, and a tensor's hook there sees all tasks' gradients at
            once.
        retain_graph: keep the graphs for another backward pass.
        second: the same tasks' losses on another batch, for the methods that need them, ``MoDo`` and ``SDMGrad``, and
            only for those. An entry is None where that of ``losses`` is. Their gradients give dot products with those
            of ``losses`` and no part of the update. Their graphs are freed.
        process_group: the ranks of torch.distributed that take the step together, each with its part of the batch: a
            process group; None for the default one if there is one; False for this rank alone. The task gradients are
            means over the ranks, and all ranks get the same result. So all must give the same ``params``, with the same
            values, and as many losses; a task that a rank lacks counts there with a loss of 0. If ``params`` holds
            DTensors, the ranks are those of their device mesh, and all ranks give losses of the same tasks.
        through: what the Gramian is computed from. "rows": from each task's gradient, T rows of P numbers.
            "activations": from each layer's inputs and each task's gradients by its outputs, for losses of one forward
            pass. The Gramian and the update are those of the rows, up to rounding. Weights of linear layers,
            convolutions and embeddings go this way; other parameters have rows, one tensor at a time. "features": from
            the gradients by ``features`` alone. This is another method, no approximation: LibMTL's ``rep_grad``, or
            with ``per_example=True`` MGDA-UB (Sener and Koltun 2018) and Aligned-MTL-UB (Senushkin et al. 2023). All
            below ``features`` is under surgery, and gets one backward pass. Each other parameter gets the sum of its
            tasks' gradients. There are no task gradients for ``groups``, ``shared``, ``suppression``, and methods that
            look at entries or keep means.
        finish: how a step through activations ends. "backward": by an ordinary backward pass of Σ w_i L_i, in which
            parameters of one task are unweighted. It runs all hooks. No more than one layer's gradients of T tasks are
            alive before it; with DTensors in ``params``, which ``fully_shard`` must have made, those of all layers are.
            "kept": these are kept for all layers, T times the activations, and each weight's gradient is one product
            with their weighted sum. There is no second pass. It takes ``groups``, ``shared`` and ``suppression`` too.
        gramian: a :class:`gradkern.Sketch` that estimates the Gramian of a step through activations; None for the exact
            one. Use the same object in all steps: each has signs of its own.
        per_example: whether a step through features takes dot products of the gradients of each example's features, as
            MGDA-UB and Aligned-MTL-UB do. If not, it takes those of their sums over dimension 0, the batch, as LibMTL.

    Returns:
        The step's losses, Gramian and weights, as tensors that stay on the device. On several ranks ``losses`` are
        means over the ranks, and all else is of the mean gradients.

    Raises:
        TypeError, ValueError: an argument is not as described above, a loss reaches none of ``params``, a graph holds
            reentrant checkpointing or is freed already, nothing can be added to a ``.grad``, or the ranks do not take
            the same step. In all these cases, and whatever else raises, every ``.grad`` and the state of
            ``aggregator`` and ``suppression`` are as before, with three exceptions. Numbers drawn from torch's default
            generators stay drawn. Methods that weigh losses, and steps through activations with ``finish="backward"``,
            run torch's own backward pass; if that fails halfway, as by a hook that raises, ``.grad`` may be partly
            written. In all other steps post-accumulate hooks run after everything else: if one raises, ``.grad`` is
            written and the step counts.
        RuntimeError: another rank has raised in this step, or has another table of ``gradkern tune``. All ranks raise
            then.
        NotImplementedError: something in the step does not work on several ranks yet.

    Warns:
        UserWarning: surgery does nothing, because there is one task in the step or no parameter is shared; or in the
            first step of some parameters each entry of a shared one has a gradient of one task at most. It comes once
            for an ``aggregator``, before anything has changed.
    """
    way = Way(through, finish, gramian, per_example)
    options = Options(aggregator, groups, shared, suppression, process_group=process_group, way=way)
    source = from_losses(losses, features, batched, retain_graph)
    return run(source, grad_sink(source, options), options, params, second)


def grad_sink(source: Source, options: Options) -> Sink:
    """Return the sink that writes ``.grad``: torch's own backward pass if the step needs no rows."""
    method = options.aggregator
    if options.is_weighted_backward and isinstance(source, Losses):  # sums of micro-batches have rows already
        assert isinstance(method, Scalarization)
        comm = comm_of(options.process_group)
        if not method.needs_gramian:
            return WeightedBackwardSink(source, method) if comm is None else MeanBackwardSink(source, method, comm)
        if comm is None and options.way.through != "features":  # with them, the trunk's pass after the Gramian is it
            return WeightedBackwardSink(source, method)
    if options.way.through == "activations" and options.way.finish == "backward":
        assert isinstance(source, Losses), "it has no sums of micro-batches"
        comm = comm_of(options.process_group)
        return WeightedPassSink(source) if comm is None else MeanWeightedPassSink(source, comm)
    return GradSink()


@outside_inference_mode
def add_up(total: Accumulation, losses: Losses, params: Params) -> SurgeryInfo:
    """Add the task gradients of ``losses`` to ``total``, the source of a later step."""
    targets = Targets.of(params, groups="model", shared=None)
    open_source(losses, targets)
    return total.add(losses, targets)
