import numpy as np
import pytest
import torch
from torch import nn

import quickspike as qs
from quickspike import capture
from quickspike.errors import TraceError, UnsupportedOperatorError


def models():
    from torchvision import models  # Here, because it takes a second that every run of the tests would pay.

    return models


def images():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def converted(net):
    with torch.no_grad():
        snn = qs.convert(net, images(), "threshold_balancing", steps=2)
        run = snn.run(images())
    assert bool(torch.isfinite(run.logits).all())
    assert run.steps == 2
    assert set(run.spikes) == {site.name for site in snn.sites}
    return snn


def built(name, **options):
    torch.manual_seed(0)
    net = models().get_model(name, weights=None, num_classes=10, **options)
    if name.startswith("vgg"):  # Its head has 120 million weights, and copying them would take most of the time.
        net.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    return net


# Number of activation calls in the source; a pool in front of an activation that others read too adds a twin.
NETWORKS = {
    "resnet18": ({}, 17),
    "vgg11_bn": ({"init_weights": False}, 9),
    "mobilenet_v2": ({}, 35),
    "squeezenet1_0": ({}, 26),
    "googlenet": ({"aux_logits": False, "init_weights": False}, 57),
    "densenet121": ({}, 121),
    "shufflenet_v2_x0_5": ({}, 37),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_convolutional_network_converts(name):
    options, activations = NETWORKS[name]
    snn = converted(built(name, **options))
    assert len(snn.sites) >= activations


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_both_recorders_find_the_same_sites_and_lines(name, monkeypatch):
    def no_fx(*_):
        raise TraceError("not by torch.fx. Way out: none")

    net = built(name, **NETWORKS.get(name, ({}, 0))[0])
    by_fx = qs.trace(net, images())
    monkeypatch.setattr(capture, "_record", no_fx)
    exported = qs.trace(net, images())
    assert exported.sites == by_fx.sites
    assert all(site.source.startswith("torchvision/") for site in exported.sites)
    larger = torch.randn(1, 3, 97, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(exported.module(larger), by_fx.module(larger), atol=1e-4)


def settled(net):
    """Statistics of batch norm as after training; drawn weights alone let activations vanish."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return net.eval()


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_the_error_of_a_whole_network_falls_as_one_over_t(name):
    """Streaming, nothing clipped: every neuron owes a spike or so after T steps, however deep the network is."""
    net = built(name, **NETWORKS[name][0])
    if name == "vgg11_bn":
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    net, x = settled(net), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    times = SLOPE[name]
    snn = qs.convert(net, x, steps=times[-1], ceiling="percentile", percentile=100.0)
    with torch.no_grad():
        logits, wanted = snn.run(x).logits, net(x)
    errors = [float((logits[steps - 1] - wanted).abs().mean()) for steps in times]
    slope = np.polyfit(np.log(times), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.75, errors


# From where on every layer has settled; a deeper network needs more steps until then (ResNet-18 is at -0.82 here).
SLOPE = {"resnet18": (512, 1024, 2048), "vgg11_bn": (64, 128, 256, 512)}


def vision_transformer():
    return models().VisionTransformer(64, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)


@pytest.mark.parametrize("make", [lambda: built("swin_t"), vision_transformer], ids=["swin_t", "vit"])
def test_a_transformer_is_refused_with_line_and_way_out(make):
    net = make()
    with pytest.raises(UnsupportedOperatorError, match=r"LayerNorm.* at torchvision/\S+\.py:\d+ in .*Way out: train with batch norm"):
        qs.trace(net, images())
    assert not qs.inspect(net, images()).convertible


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
def test_a_network_with_gates_and_smooth_activations_is_approximated(name):
    net = built(name)
    # Statistics of batch norm as after training; drawn weights alone let activations vanish.
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    net.eval()
    coverage = qs.inspect(net, images())
    assert coverage.convertible
    assert {finding.operator for finding in coverage.findings if finding.error} & {"SiLU", "Hardswish"}
    with torch.no_grad():
        expected = net(images())
        traced = [qs.trace(net, images(), pieces=pieces).module(images()) for pieces in (16, 64)]
        errors = [float((found - expected).abs().max() / expected.abs().max()) for found in traced]
    assert errors[1] < errors[0] / 3
    assert errors[0] < 0.25


def test_a_network_with_layer_norm_is_kept_analog_on_request():
    net = built("convnext_tiny")
    with pytest.raises(UnsupportedOperatorError, match=r"layer_norm.* at torchvision/\S+\.py:\d+ in .*keep it on real values"):
        qs.trace(net, images())
    assert qs.inspect(net, images(), analog=("layer_norm", "LayerNorm")).convertible


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_a_timm_resnet_converts(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    snn = converted(timm.create_model(name, pretrained=False, num_classes=10))
    assert len(snn.sites) >= 9


def segmentation():
    return models().segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def pyramid():
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None)


@pytest.mark.parametrize(("make", "bound"), [(segmentation, 0.02), (pyramid, 0.12)], ids=["segmentation", "detection backbone"])
def test_what_gives_maps_converts_too(make, bound):
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        wanted = net(images())
        found = qs.convert(net, images(), steps=32, ceiling="percentile", percentile=100.0)(images())
    assert list(found) == list(wanted)
    for name, one in wanted.items():
        assert float((found[name] - one).norm() / one.norm()) < bound, name


def test_a_whole_detector_is_refused_by_what_it_returns():
    net = models().detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(TraceError, match=r"SSD returns a tensor of torch.int64 at \[0\]\['labels'\]"):
        qs.trace(net.eval(), images())
