"""The generator that starts at the Gaussian: its images at first, what reaches the residual, gradients, files."""

import pytest
import torch

from gdd_dist.models.files import generator_meta, load_generator_network, save_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.residual_generator import ResidualGenerator, started_at
from sharding.errors import UserError

NOISE = 5


def linear(size=16, channels=3, latent=6, classes=4):
    torch.manual_seed(1)
    net = LinearGenerator(classes=classes, channels=channels, size=size, latent=latent)
    net.mean.normal_(0, 0.3)
    net.basis.copy_(torch.linalg.qr(torch.randn(net.basis.shape[1], latent)).Q.T)
    net.class_means.normal_()
    net.roots.normal_()
    return net


def started(**arguments):
    net = started_at(linear(), noise=NOISE, width=16, **arguments)
    return net, torch.randn(8, net.latent), torch.arange(8) % 4


def moved(net):
    """As after some training: a residual that is not zero."""
    with torch.no_grad():
        net.to_image.weight.normal_(0, 0.3)
        for module in net.modules():
            if hasattr(module, "last"):
                module.last.weight.normal_(0, 0.1)
    return net


@pytest.mark.parametrize("patch", [1, 2])
def test_it_draws_what_the_gaussian_draws_until_it_is_trained(patch):
    net, z, y = started(patch=patch)
    torch.testing.assert_close(net(z, y), net.linear(z[:, :-NOISE], y), atol=0, rtol=0)


def test_the_residual_depends_on_its_own_noise_and_on_the_linear_image_alone():
    net, z, y = started()
    moved(net)
    image = net.linear(z[:, :-NOISE], y)
    residual = net(z, y) - image
    other = z.clone()
    other[:, -NOISE:] = torch.randn(8, NOISE)
    assert (net(other, y) - image - residual).abs().max() > 1e-3
    # Another class and latent that draw the same linear image: the same picture.
    with torch.no_grad():
        net.linear.class_means.copy_(net.linear.class_means[:1].expand(4, -1))
        net.linear.roots.copy_(net.linear.roots[:1].expand(4, -1))
    torch.testing.assert_close(net(z, y), net(z, (y + 1) % 4))


def test_the_linear_part_is_no_parameter_and_gradients_pass_the_clamp():
    net, z, y = started()
    assert not [name for name, _ in net.named_parameters() if name.startswith("linear")]
    with torch.no_grad():
        net.linear.mean.fill_(5.0)  # all pixels beyond the clamp
    net(z, y).sum().backward()
    assert net.to_image.bias.grad.abs().min() > 0


def test_images_stay_in_range_and_the_linear_part_computes_in_float32_under_autocast():
    net, z, y = started()
    with torch.autocast("cpu", torch.bfloat16):
        images = net(z * 3, y)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    torch.testing.assert_close(images, net.linear(z[:, :-NOISE] * 3, y), atol=0, rtol=0)


def test_its_file_rebuilds_it_and_a_kind_of_tomorrow_is_named(tmp_path):
    net, z, y = started(patch=2)
    path = tmp_path / "generator.safetensors"
    save_network(path, moved(net), generator_meta(net))
    again, meta = load_generator_network(path)
    assert isinstance(again, ResidualGenerator)
    assert meta["family"] == "residual"
    assert (again.latent, again.classes, again.channels, again.size) == (6 + NOISE, 4, 3, 16)
    torch.testing.assert_close(again(z, y), net(z, y), atol=0, rtol=0)
    save_network(path, net, {**generator_meta(net), "family": "diffusion"})
    with pytest.raises(UserError, match="of kind diffusion, which this version does not know; update"):
        load_generator_network(path)
