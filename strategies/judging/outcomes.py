"""The possible outcomes of a client's reply: one word for the exception, the report and the metric's label."""

from enum import Enum


class Outcome(Enum):
    """The outcome of one reply. The name is the label, the value is the advice."""

    accepted = "the update is part of the sum"
    client_error = "the client's app failed; its traceback is in the log of its SuperNode"
    timeout = "no reply before the deadline; raise round-timeout-seconds, or look at the client's load"
    unavailable = "the SuperLink lost the node or the message; the client takes part again when it is back"
    left_out = "the app's own aggregate_train did not hand the reply on; nothing is to be done"
    malformed = (
        "the reply cannot be read; its detail says what to change, and else install the same fedbasin on both sides and "
        "send it again"
    )
    schema_version = "client and server use different versions of the wire; install the same fedbasin on both"
    missing_mod = "the client's app lacks the mod; give it ClientApp(mods=[basin(model=..., data=...)])"
    wrong_round = "the reply answers another round or stage; it came late, nothing is to be done"
    late = (
        "the reply came after its round; raise round-timeout-seconds, or set late-rounds to use it in a later round with "
        "less weight"
    )
    duplicate = "this client is already part of the sum of this stage; the first reply counts"
    wrong_anchor = "the client worked from another global model than this round's"
    function_changed = (
        "alignment changed the function of the client's model: the symmetry does not fit it; run "
        "fedbasin.strategies.symmetry.check on it, and set fedbasin.align = 'off' until it passes"
    )
    lost_model = (
        "the client no longer has the models that this stage builds on, as after a restart of its SuperNode; "
        "the stage goes on without it"
    )
    symmetry_mismatch = "the client aligned its model by another symmetry than the server sent"
    frozen_changed = (
        "the client trained a factor of its adapters that this round has frozen; set requires_grad to False for the "
        "factor that the message's config names as frozen-factor"
    )
    missing_tensor = "a tensor of the global model is not in the update; send the whole state dict"
    unexpected_tensor = "the update has a tensor that the global model lacks; use the same model class"
    wrong_shape = "a tensor has another shape than in the global model; use the same model settings"
    wrong_dtype = "a tensor has another dtype than in the global model; convert it on the client"
    non_finite = (
        "a tensor has NaN or infinite entries; lower the learning rate or clip gradients, or, of a statistic, look for "
        "such entries in the data"
    )
    out_of_line = (
        "the update is far from those of the other clients, or from what finite inputs can give; look at the client's "
        "data, lower its learning rate, or leave it out"
    )
    overflow = (
        "the sum was not finite, or could not be solved, with this reply in it; look at the client's data, lower its "
        "learning rate, or leave it out"
    )
    not_handled = (
        "handling the reply failed with an error that names no cause; install the same fedbasin on both sides, and report "
        "the error with its detail"
    )
    bad_weight = (
        "the client's weight must be a finite number above zero; send it in the metrics, as `num-examples` or as "
        "fedbasin.weighted-by-key names it"
    )
    missing_statistic = "the recipe needs statistics that are not in the update; give the mod its data"
    unexpected_statistic = "the update has statistics that the recipe did not request"
    not_symmetric = "a Gram matrix is not symmetric; collect it with fedbasin.client"
    not_positive = (
        "a variance or a Fisher diagonal is negative, or a Gram matrix is not positive semi-definite; send the statistics "
        "as torch and fedbasin.client collect them"
    )
    inconsistent = (
        "statistics of the reply contradict each other; collect them with fedbasin.client, from one model and one set of "
        "data"
    )
    too_many = (
        "the recipe keeps each client's statistics in place of a sum, and has as many as it can keep; ask fewer clients "
        "(fedbasin.fraction-train), or choose the recipe regmean or fisher"
    )
    too_large = "the reply has more bytes than max-update-bytes allows, or more entries than the model has use for"
    no_evaluate = (
        "the client's app has no function that evaluates, and is not asked to evaluate again; add one with "
        "@app.evaluate(), or set fraction-evaluate = 0"
    )


class Refusal(ValueError):  # noqa: N818 - the word of the reports, not an accident
    """A reply that must not become part of the sum.

    Attributes:
        outcome: the reason.
        detail: what and where, in one line.
    """

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome.name}: {detail}; {outcome.value}")
        self.outcome = outcome
        self.detail = detail
