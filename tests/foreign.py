"""The attention gates of other libraries, written anew: their layers, names, calls and results."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class LeeGate(nn.Module):
    """LeeJunHyun's Attention_block, the most copied one; MONAI's without its wrapper."""

    def __init__(self, F_g, F_l, F_int, dims=2):
        super().__init__()
        conv, norm = CONV[dims], BATCH[dims]
        self.W_g = nn.Sequential(conv(F_g, F_int, 1), norm(F_int))
        self.W_x = nn.Sequential(conv(F_l, F_int, 1), norm(F_int))
        self.psi = nn.Sequential(conv(F_int, 1, 1), norm(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g, x):
        psi = self.relu(self.W_g(g) + self.W_x(x))
        return x * self.psi(psi)


class SwappedGate(LeeGate):
    """bigmb's: the constructor takes F_l for what W_g reads, F_g for what W_x reads."""

    def __init__(self, F_l, F_g, F_int):
        super().__init__(F_l, F_g, F_int)


class NamedGate(nn.Module):
    """sfczekalski's and bio-image-unet's: W_gate, and keywords of their own."""

    def __init__(self, F_g, F_l, n_coefficients):
        super().__init__()
        self.W_gate = nn.Sequential(nn.Conv2d(F_g, n_coefficients, 1), nn.BatchNorm2d(n_coefficients))
        self.W_x = nn.Sequential(nn.Conv2d(F_l, n_coefficients, 1), nn.BatchNorm2d(n_coefficients))
        self.psi = nn.Sequential(nn.Conv2d(n_coefficients, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, gate, skip_connection):
        psi = self.relu(self.W_gate(gate) + self.W_x(skip_connection))
        return skip_connection * self.psi(psi)


class FastEstimatorGate(nn.Module):
    """FastEstimator's: as many channels in between as outside, sigmoid as a function."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.dec_layers = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))
        self.enc_layers = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))
        self.attn_layers = nn.Sequential(nn.Conv2d(out_channels, 1, 1), nn.BatchNorm2d(1))

    def forward(self, decoder_input, encoder_input):
        psi = F.relu(self.dec_layers(decoder_input) + self.enc_layers(encoder_input))
        return encoder_input * torch.sigmoid(self.attn_layers(psi))


class BiaPyGate(nn.Module):
    """BiaPy's: x's branch never gets its norm."""

    def __init__(self, conv, in_size, out_size, norm="none", in_size_bridge=None):
        super().__init__()
        dims = {nn.Conv2d: 2, nn.Conv3d: 3}[conv]
        make = {"none": None, "bn": BATCH[dims], "in": INSTANCE[dims]}[norm]
        w_g = [conv(in_size, out_size, 1)] + ([make(out_size)] if make else [])
        psi = [conv(out_size, 1, 1)] + ([make(1)] if make else []) + [nn.Sigmoid()]
        self.w_g = nn.Sequential(*w_g)
        self.w_x = nn.Sequential(conv(in_size_bridge or in_size, out_size, 1))
        self.psi = nn.Sequential(*psi)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g, x):
        psi = self.relu(self.w_g(g) + self.w_x(x))
        return self.psi(psi) * x


class ChannelGate(nn.Module):
    """nikhilroxtomar's: a map for every channel, no norm on psi."""

    def __init__(self, in_c, out_c):
        super().__init__()
        self.Wg = nn.Sequential(nn.Conv2d(in_c[0], out_c, 1), nn.BatchNorm2d(out_c))
        self.Ws = nn.Sequential(nn.Conv2d(in_c[1], out_c, 1), nn.BatchNorm2d(out_c))
        self.relu = nn.ReLU(inplace=True)
        self.output = nn.Sequential(nn.Conv2d(out_c, out_c, 1), nn.Sigmoid())

    def forward(self, g, s):
        return self.output(self.relu(self.Wg(g) + self.Ws(s))) * s


class GridGate(nn.Module):
    """GridAttentionBlock2D/3D of the authors' code in its concatenation modes, and what others made of it.

    ivadomed: align_corners=True. CA-Net: theta_bias=True, sub_sample=1. Advanced_nnUNet: kernel=3, padded,
    output_norm="instance".
    """

    def __init__(
        self,
        in_channels,
        gating_channels,
        inter_channels=None,
        dims=2,
        mode="concatenation",
        sub_sample=2,
        kernel=None,
        theta_bias=False,
        align_corners=False,
        output_norm="batch",
    ):
        super().__init__()
        inter = inter_channels or max(1, in_channels // 2)
        conv = CONV[dims]
        padding = 0 if kernel is None else (kernel - 1) // 2
        self.dims, self.mode, self.align_corners = dims, mode, align_corners
        self.operation_function = self._concatenation  # a bound method among the attributes, as theirs
        self.W = nn.Sequential(
            conv(in_channels, in_channels, 1),
            BATCH[dims](in_channels) if output_norm == "batch" else INSTANCE[dims](in_channels, affine=True),
        )
        self.theta = conv(
            in_channels, inter, kernel or sub_sample, sub_sample, padding=padding, bias=theta_bias
        )
        self.phi = conv(gating_channels, inter, 1)
        self.psi = conv(inter, 1, 1)

    def resize(self, t, size):
        return F.interpolate(t, size=size, mode=LINEAR[self.dims], align_corners=self.align_corners)

    def forward(self, x, g):
        return self.operation_function(x, g)

    def _concatenation(self, x, g):
        theta = self.theta(x)
        f = theta + self.resize(self.phi(g), theta.shape[2:])
        f = F.softplus(f) if self.mode == "concatenation_debug" else F.relu(f, inplace=True)
        psi = self.psi(f)
        if self.mode == "concatenation_residual":
            alpha = F.softmax(psi.flatten(2), dim=2).view(psi.shape)
        else:
            alpha = torch.sigmoid(psi)
        alpha = self.resize(alpha, x.shape[2:])
        return self.W(alpha.expand_as(x) * x), alpha


class MultiGate(nn.Module):
    """MultiAttentionBlock of the authors' code: two gates, their results combined."""

    def __init__(self, in_size, gate_size, inter_size, dims=2):
        super().__init__()
        self.gate_block_1 = GridGate(in_size, gate_size, inter_size, dims)
        self.gate_block_2 = GridGate(in_size, gate_size, inter_size, dims)
        self.combine_gates = nn.Sequential(
            CONV[dims](2 * in_size, in_size, 1), BATCH[dims](in_size), nn.ReLU(inplace=True)
        )

    def forward(self, input, gating_signal):
        one, alpha_one = self.gate_block_1(input, gating_signal)
        two, alpha_two = self.gate_block_2(input, gating_signal)
        return self.combine_gates(torch.cat([one, two], 1)), torch.cat([alpha_one, alpha_two], 1)


class TorrGate(nn.Module):
    """GridAttentionBlock2D_TORR of sononet: no bias but psi's, phi strided too, normalisers over the map."""

    def __init__(self, in_channels, gating_channels, inter_channels, mode, sub_sample=1, use_W=True):
        super().__init__()
        self.mode = mode
        self.theta = nn.Conv2d(in_channels, inter_channels, sub_sample, sub_sample, bias=False)
        self.phi = nn.Conv2d(gating_channels, inter_channels, sub_sample, sub_sample, bias=False)
        self.psi = nn.Conv2d(inter_channels, 1, 1)
        nn.init.constant_(self.psi.bias, 10.0 if mode == "softmax" else 3.0)
        self.W = lambda y: y
        if use_W:
            self.W = nn.Sequential(nn.Conv2d(in_channels, in_channels, 1), nn.BatchNorm2d(in_channels))

    def forward(self, x, g):
        theta = self.theta(x)
        phi = F.interpolate(self.phi(g), size=theta.shape[2:], mode="bilinear")
        q = self.psi(F.relu(theta + phi, inplace=True))
        flat = q.flatten(2)
        if self.mode == "softmax":
            flat = F.softmax(flat, dim=2)
        elif self.mode == "mean":
            flat = flat / flat.sum(2, keepdim=True)
        elif self.mode == "mean_flow":
            flat = flat - flat.min(2, keepdim=True)[0]
            flat = flat / flat.sum(2, keepdim=True)
        elif self.mode == "range":
            low, high = flat.min(2, keepdim=True)[0], flat.max(2, keepdim=True)[0]
            flat = (flat - low) / (high - low)
        else:
            flat = torch.sigmoid(flat)
        alpha = F.interpolate(flat.view(q.shape), size=x.shape[2:], mode="bilinear")
        return self.W(alpha.expand_as(x) * x), alpha


class EsrganGate(nn.Module):
    """A-ESRGAN's add_attn: theta 2x2 without bias, as many channels in between as x has; returns y alone."""

    def __init__(self, x_channels, g_channels=256):
        super().__init__()
        self.W = nn.Sequential(nn.Conv2d(x_channels, x_channels, 1), nn.BatchNorm2d(x_channels))
        self.theta = nn.Conv2d(x_channels, x_channels, 2, 2, bias=False)
        self.phi = nn.Conv2d(g_channels, x_channels, 1)
        self.psi = nn.Conv2d(x_channels, 1, 1)

    def forward(self, x, g):
        theta = self.theta(x)
        phi = F.interpolate(self.phi(g), size=theta.shape[2:], mode="bilinear", align_corners=False)
        alpha = torch.sigmoid(self.psi(F.relu(theta + phi, inplace=True)))
        alpha = F.interpolate(alpha, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.W(alpha.expand_as(x) * x)


class PyMICGate(nn.Module):
    """PyMIC's AttentionGateBlock: x on g's grid before its convolution."""

    def __init__(self, dim, chns_l, chns_h):
        super().__init__()
        conv, inter = CONV[dim], min(chns_l, chns_h) // 2
        self.dim = dim
        self.conv1_l = conv(chns_l, inter, 1)
        self.conv1_h = conv(chns_h, inter, 1)
        self.conv2 = conv(inter, 1, 1)
        self.act1, self.act2 = nn.ReLU(), nn.Sigmoid()

    def resize(self, t, size):
        return F.interpolate(t, size=size, mode=LINEAR[self.dim], align_corners=False)

    def forward(self, x_l, x_h):
        q = self.act1(self.conv1_l(self.resize(x_l, x_h.shape[2:])) + self.conv1_h(x_h))
        alpha = self.act2(self.conv2(q))
        return self.resize(alpha, x_l.shape[2:]) * x_l


class TailGate(nn.Module):
    """What else occurs: other norms and activations, bias or none, g resized before or behind its norm."""

    def __init__(self, norm="group", activation=F.relu, bias=False, psi_norm=True, resize="behind", dims=2):
        super().__init__()
        conv = CONV[dims]
        makers = {
            "group": lambda n: nn.GroupNorm(1, n),
            "instance": INSTANCE[dims],
            "batch": BATCH[dims],
        }

        def projection(channels, inter):
            return nn.Sequential(conv(channels, inter, 1, bias=bias), makers[norm](inter))

        self.W_x, self.W_g = projection(6, 4), projection(8, 4)
        self.psi = projection(4, 1) if psi_norm else nn.Sequential(conv(4, 1, 1))
        self.activation, self.where, self.dims = activation, resize, dims

    def resize(self, t, x):
        if t.shape[2:] == x.shape[2:]:
            return t
        return F.interpolate(t, size=x.shape[2:], mode=LINEAR[self.dims], align_corners=True)

    def forward(self, x, g):
        if self.where == "before":
            g = self.resize(g, x)
        g = self.W_g(g)
        if self.where == "behind":
            g = self.resize(g, x)
        return x * torch.sigmoid(self.psi(self.activation(self.W_x(x) + g)))


def seasoned(net, seed=0):
    """Norms with random scales, shifts and statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if not isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            continue
        for name in ("weight", "bias", "running_mean"):
            if getattr(layer, name, None) is not None:
                t = getattr(layer, name)
                t.data.copy_(torch.randn(t.shape, generator=generator))
        if getattr(layer, "running_var", None) is not None:
            layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) * 1.5 + 0.5)
    return net
