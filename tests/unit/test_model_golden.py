"""HLAT's own numbers: initial parameter norms and initial loss of the published models."""

import math

import pytest
import torch
import torch.nn.functional as F

from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.model.init import init_std, init_tensor, parameter_shapes

# arXiv 2404.10630's code with the initialisation that its logs show: 0.021 for the 7B, 0.02 for the 70B.
NORMS = {"hlat-7b": 1542, "hlat-70b": 4394}


def square_sum(config: ModelConfig, name: str) -> float:
    """Sum of squares of one initial tensor."""
    return init_tensor(config, name, parameter_shapes(config)[name], seed=0).double().square_().sum().item()


@pytest.mark.parametrize("preset", NORMS)
def test_expected_parameter_norm(preset: str) -> None:
    config = ModelConfig(preset=preset)
    square = sum(
        math.prod(shape) * (init_std(config, name) or 1.0) ** 2
        for name, shape in parameter_shapes(config).items()
    )
    assert math.sqrt(square) == pytest.approx(NORMS[preset], abs=1)


@pytest.mark.slow
def test_parameter_norm_of_the_7b() -> None:
    """Every tensor is drawn, one at a time."""
    config = ModelConfig(preset="hlat-7b")
    square = sum(square_sum(config, name) for name in parameter_shapes(config))
    assert math.sqrt(square) == pytest.approx(NORMS["hlat-7b"], abs=1)


@pytest.mark.slow
def test_parameter_norm_of_the_70b() -> None:
    """The embedding, the head and the first layer are drawn; the other 79 layers repeat the first.

    The norm of a tensor of more than 8 million draws is known to 0.03 %.
    """
    config = ModelConfig(preset="hlat-70b")
    drawn = [
        name
        for name in parameter_shapes(config)
        if not name.startswith("layers.") or name.startswith("layers.0.")
    ]
    square = sum(square_sum(config, name) * (config.layers if "layers.0." in name else 1) for name in drawn)
    assert math.sqrt(square) == pytest.approx(NORMS["hlat-70b"], abs=3)


@pytest.mark.slow
def test_initial_loss_of_the_7bs_width() -> None:
    """ln V + h·std²/2: the final norm gives a state the length √h, so logits have the variance h·std².

    Four layers are enough, because the final norm takes their number out. bf16 weights stay within 8 GB.
    """
    config = ModelConfig(preset="hlat-7b", layers=4)
    with torch.device("meta"):
        model = Decoder(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.init_weights(seed=0)
    ids = torch.randint(0, config.vocab, (2, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.hidden(ids[:, :-1])
        losses = [F.cross_entropy(model.head(h).float(), t) for h, t in zip(hidden, ids[:, 1:], strict=True)]
    expected = math.log(config.vocab) + config.hidden * config.init_std**2 / 2
    assert expected == pytest.approx(11.28, abs=0.01)
    # 256 targets: the mean of logits of variance 1.8 has a standard error of 0.084.
    assert torch.stack(losses).mean().item() == pytest.approx(expected, abs=0.25)
