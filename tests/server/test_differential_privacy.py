"""FedBasin under Flower's differential-privacy wrappers, with real client apps."""

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from torch import nn

from fedbasin.client import basin
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.tensors.state import distance
from tests import tiny
from tests.server.flowers_loop import BAD, arrays_of, fed_basin, is_finite, nan_in_training, refused, start, state_of

NORM = 0.5


def server_side(strategy, noise=0.0, norm=NORM):
    return DifferentialPrivacyServerSideFixedClipping(strategy, noise, norm, 3)


def client_side(strategy, noise=0.0, norm=NORM):
    return DifferentialPrivacyClientSideFixedClipping(strategy, noise, norm, 3)


def private(wrap, clients=3, **more):
    """Clients as the wrapper needs them; their alignment stands outside, so that it follows clipping."""
    mods = [fixedclipping_mod] if wrap is client_side else None
    return tiny.federation(clients, tiny.make_app(train_mods=mods), **more)


@pytest.mark.parametrize("wrap", [server_side, client_side])
class TestUnderDifferentialPrivacy:
    @pytest.mark.parametrize("align", ["client", "server", "off"])
    def test_fedavg_runs_with_noise(self, wrap, align):
        np.random.seed(0)  # noqa: NPY002 - where Flower draws its noise
        strategy = fed_basin(symmetry=tiny.symmetry(), align=align)
        result = start(wrap(strategy, noise=0.01), private(wrap), 3)
        assert strategy.refusals == {}
        assert is_finite(result)
        assert result.evaluate_metrics_clientapp[3]["accuracy"] > 0.3

    @pytest.mark.parametrize("align", ["client", "server"])
    def test_the_mean_is_no_further_from_the_anchor_than_the_clipping_norm(self, wrap, align):
        strategy = fed_basin(symmetry=tiny.symmetry(), align=align)
        moved = [
            distance(state_of(start(w, private(wrap))), tiny.net().state_dict())
            for w in (wrap(strategy, norm=0.01), wrap(strategy, norm=1e6))
        ]
        assert moved[0] <= 0.01 * 1.0001 < moved[1]

    def test_without_noise_and_clipping_it_is_fedavg(self, wrap):
        plain = start(fed_basin(), tiny.federation())
        result = start(wrap(fed_basin(), norm=1e6), private(wrap))
        for name, tensor in state_of(plain).items():
            torch.testing.assert_close(state_of(result)[name], tensor)

    def test_a_scalar_counter_passes_as_all_clients_have_it(self, wrap):
        result = start(wrap(fed_basin(), noise=0.01), private(wrap))
        counter = state_of(result)["1.num_batches_tracked"]
        assert (counter.dtype, int(counter)) == (torch.int64, 3)

    def test_a_bad_reply_does_not_end_the_run(self, wrap):
        federation = private(wrap, tamper={BAD: nan_in_training})
        strategy = fed_basin()
        result = start(wrap(strategy), federation, 2)
        assert refused(strategy) == {BAD: Outcome.non_finite}
        assert is_finite(result)

    def test_a_clients_error_skips_the_round_and_the_next_one_counts(self, wrap):
        federation = private(wrap)
        federation.contexts[BAD].run_config["fail"] = True

        def recover(reply):
            federation.contexts[BAD].run_config["fail"] = False
            return reply

        federation.tamper = {BAD: recover}
        result = start(wrap(fed_basin()), federation, 2)
        assert list(result.train_metrics_clientapp) == [2]
        assert is_finite(result)


class TestIntegerBuffersUnderDifferentialPrivacy:
    """What FedBasin's docstring warns of: Flower's clipping scales every array of more than no dimension."""

    def net(self, persistent):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(tiny.PIXELS, tiny.CLASSES))
        model.register_buffer("positions", torch.arange(5), persistent=persistent)
        return model

    def federation(self, model):
        app = ClientApp(mods=[basin(model=lambda context: model())])

        @app.train()
        def train(message, context):
            own = model()
            own.load_state_dict(message.content["arrays"].to_torch_state_dict())
            own[0].bias.data += 1
            metrics = MetricRecord({"num-examples": 5})
            content = RecordDict({"arrays": arrays_of(own), "metrics": metrics})
            return Message(content, reply_to=message)

        return tiny.federation(3, app)

    def wrapped(self):
        return server_side(fed_basin(fraction_evaluate=0.0), norm=0.1)

    def test_in_the_state_dict_they_stop_flowers_wrapper(self):
        federation = self.federation(lambda: self.net(persistent=True))
        with pytest.raises(TypeError, match="Cannot cast ufunc 'multiply'"):
            start(self.wrapped(), federation, model=self.net(persistent=True))

    def test_out_of_the_state_dict_all_is_well(self):
        federation = self.federation(lambda: self.net(persistent=False))
        model = self.net(persistent=False)
        result = start(self.wrapped(), federation, model=model)
        assert distance(state_of(result), model.state_dict()) == pytest.approx(0.1, rel=1e-4)
