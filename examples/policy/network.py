"""The network of a diffusion policy: a 1-D U-Net over the actions of a plan, conditioned by FiLM.

The form is that of Chi et al., "Diffusion Policy" (2303.04137), with the names of LeRobot's ``DiffusionPolicy``:
``down_dims``, ``kernel_size``, ``n_groups``, ``diffusion_step_embed_dim``, ``use_film_scale_modulation``, and
``global_cond=`` for what the robot sees. Shapes depend on nothing but the input's, so it compiles in one piece and can
be recorded as a CUDA graph.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Channels of the levels, by the number of parameters that they give (action_dim 4, cond_dim 20).
SIZES: dict[str, tuple[int, ...]] = {
    "0.5M": (16, 32, 64),
    "4.4M": (64, 128, 256),
    "16M": (128, 256, 512),
    "63M": (256, 512, 1024),
}
SMALL = 1 << 12  # elements


class StepEmbedding(nn.Module):
    """Sines and cosines of the diffusion time, geometrically spaced periods from 2 pi to 20,000 pi."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1))), False)

    def forward(self, t: Tensor) -> Tensor:
        """Return (B, dim) for times t (B,)."""
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], 1)


def conv_block(inputs: int, outputs: int, kernel_size: int, n_groups: int) -> nn.Sequential:
    """Return convolution over time, group norm, Mish."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2), nn.GroupNorm(n_groups, outputs), nn.Mish()
    )


class ResidualBlock(nn.Module):
    """Two convolutions over time and a skip; the condition scales and shifts, or only shifts, the channels between."""

    def __init__(
        self, inputs: int, outputs: int, cond_dim: int, kernel_size: int, n_groups: int, scale_modulation: bool
    ) -> None:
        super().__init__()
        self.scale_modulation = scale_modulation
        self.first = conv_block(inputs, outputs, kernel_size, n_groups)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * outputs if scale_modulation else outputs))
        self.second = conv_block(outputs, outputs, kernel_size, n_groups)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return (B, outputs, T) for x (B, inputs, T) and cond (B, cond_dim)."""
        hidden, film = self.first(x), self.film(cond)[..., None]
        if self.scale_modulation:
            scale, shift = film.chunk(2, dim=1)
            hidden = scale * hidden + shift
        else:
            hidden = hidden + film
        return self.second(hidden) + self.skip(x)


class UNet1d(nn.Module):
    """Predicts the noise (or velocity) in plans x at diffusion times t, given what the robot sees.

    Args:
        action_dim: Entries of an action.
        horizon: Actions of a plan; divisible by 2 to the number of levels less one.
        cond_dim: Entries of ``global_cond``: the last ``n_obs_steps`` observations, one after another.
        down_dims: Channels of each level; each level has half the time steps of the one above. See ``SIZES``.
        kernel_size: Time steps that a convolution sees; odd.
        n_groups: Groups of the group norms; divides every entry of ``down_dims``.
        diffusion_step_embed_dim: Entries of the embedding of t.
        use_film_scale_modulation: Scale channels as well as shift them.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        down_dims: Sequence[int] = SIZES["4.4M"],
        *,
        kernel_size: int = 5,
        n_groups: int = 8,
        diffusion_step_embed_dim: int = 128,
        use_film_scale_modulation: bool = True,
    ) -> None:
        super().__init__()
        halvings = len(down_dims) - 1
        if horizon % 2**halvings:
            raise ValueError(f"horizon is {horizon}; {len(down_dims)} levels need a multiple of {2**halvings}")
        if any(dim % n_groups for dim in down_dims):
            raise ValueError(f"down_dims are {tuple(down_dims)}; each must be a multiple of n_groups, {n_groups}")
        self.action_dim, self.horizon, self.cond_dim = action_dim, horizon, cond_dim

        embed = diffusion_step_embed_dim
        self.step_encoder = nn.Sequential(
            StepEmbedding(embed), nn.Linear(embed, 4 * embed), nn.Mish(), nn.Linear(4 * embed, embed)
        )

        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embed + cond_dim, kernel_size, n_groups, use_film_scale_modulation)

        first, last = down_dims[0], down_dims[-1]
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip((action_dim, *down_dims), down_dims, strict=False):
            self.down.append(nn.ModuleList([block(inputs, outputs), block(outputs, outputs)]))
        for dim in down_dims[:-1]:
            self.downsample.append(nn.Conv1d(dim, dim, 3, stride=2, padding=1))
        self.middle = nn.ModuleList([block(last, last), block(last, last)])
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for dim, above in zip(down_dims[:0:-1], down_dims[-2::-1], strict=True):
            self.up.append(nn.ModuleList([block(2 * dim, above), block(above, above)]))
            self.upsample.append(nn.ConvTranspose1d(above, above, 4, stride=2, padding=1))
        self.out = nn.Sequential(conv_block(first, first, kernel_size, n_groups), nn.Conv1d(first, action_dim, 1))

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor) -> Tensor:
        """Return the network's output, of the shape of x.

        Args:
            x: (B, horizon, action_dim) noisy plans.
            t: (B,) diffusion times, from 0 to ``num_train_timesteps``.
            global_cond: (B, cond_dim) observations, normalised.
        """
        cond = torch.cat([self.step_encoder(t.to(x.dtype)), global_cond], 1)
        hidden, skips = x.mT, []
        for level, (first, second) in enumerate(self.down):
            if level:
                hidden = self.downsample[level - 1](hidden)
            hidden = second(first(hidden, cond), cond)
            skips.append(hidden)
        for block in self.middle:
            hidden = block(hidden, cond)
        for (first, second), upsample in zip(self.up, self.upsample, strict=True):
            hidden = torch.cat([hidden, skips.pop()], 1)
            hidden = upsample(second(first(hidden, cond), cond))
        return self.out(hidden).mT


class PackedConv(nn.Module):
    """A convolution over time as one product of matrices, for inference on a CPU.

    A plan has few time steps, and PyTorch's convolutions of two and more of them take several times as long as those
    of one, whatever their channels: most of it is rearranging. With channels last, the window of a time step is one run
    of memory, and all windows of a batch are the rows of one matrix.

    Args:
        conv: Its weights are copied.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
        super().__init__()
        weight, bias = conv.weight.detach(), conv.bias.detach()
        if isinstance(conv, nn.ConvTranspose1d):
            if (conv.kernel_size, conv.stride, conv.padding) != ((4,), (2,), (1,)):
                raise ValueError(f"only kernel 4, stride 2, padding 1 can be packed, got {conv}")
            # Both outputs of time step i see two of i - 1, i, i + 1; the third weight is zero.
            packed = weight.new_zeros(3, conv.in_channels, 2, conv.out_channels)
            packed[0, :, 0], packed[1, :, 0] = weight[:, :, 3], weight[:, :, 1]
            packed[1, :, 1], packed[2, :, 1] = weight[:, :, 2], weight[:, :, 0]
            self.taps, self.stride, self.padding, self.outputs = 3, 1, 1, 2
            weight, bias = packed.flatten(0, 1).flatten(1), bias.repeat(2)
        else:
            self.taps, self.stride, self.padding, self.outputs = weight.shape[2], conv.stride[0], conv.padding[0], 1
            weight = weight.permute(2, 1, 0).flatten(0, 1)
        self.register_buffer("weight", weight.contiguous(), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, T') for x (B, inputs, T), as the convolution does."""
        padded = F.pad(x.mT, (0, 0, self.padding, self.padding)).contiguous()  # (B, T + 2 padding, inputs)
        batch, steps, inputs = padded.shape
        count, row = (steps - self.taps) // self.stride + 1, self.taps * inputs
        windows = padded.as_strided((batch, count, row), (steps * inputs, self.stride * inputs, 1))
        output = torch.addmm(self.bias, windows.reshape(-1, row), self.weight)
        return output.view(batch, count * self.outputs, -1).mT


class PackedNorm(nn.GroupNorm):
    """A group norm of channels that lie last in memory: as an image of one row it need not be rearranged."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, T) for x (B, C, T)."""
        return super().forward(x.unsqueeze(2)).squeeze(2)


class PackedMish(nn.Module):
    """x tanh(log(1 + e^x)) = x n / (n + 1) with n = e^x + e^2x / 2: one exponential in the place of three functions."""

    def forward(self, x: Tensor) -> Tensor:
        """Return Mish of each element."""
        if x.numel() < SMALL:  # several short operations take longer than one
            return F.mish(x)
        power = x.clamp(max=20.0).exp_()  # beyond that it is x, and e^2x would overflow
        number = torch.addcmul(power, power, power, value=0.5)
        return (x * number).div_(number.add_(1))


def packed(network: UNet1d) -> UNet1d:
    """Return a copy of a network for inference on a CPU: its convolutions are products of matrices.

    One plan takes about as long as before, and two to 32 side by side half as long or less. It has nothing to be
    trained or saved.
    """

    def pack(module: nn.Module) -> None:
        for name, part in module.named_children():
            if isinstance(part, (nn.Conv1d, nn.ConvTranspose1d)):
                setattr(module, name, PackedConv(part))
            elif isinstance(part, nn.GroupNorm):
                norm = PackedNorm(part.num_groups, part.num_channels, part.eps)
                norm.load_state_dict(part.state_dict())
                setattr(module, name, norm)
            elif isinstance(part, nn.Mish):
                setattr(module, name, PackedMish())
            else:
                pack(part)

    copied = copy.deepcopy(network)
    pack(copied)
    return copied


def parameters(network: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())
