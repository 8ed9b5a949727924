"""The spellings of a ReLU that follow its rule, and what looks like one and is none."""

import torch
import torch.nn.functional as F
from torch import nn

zeros = torch.zeros_like
aten = torch.ops.aten
INF = float("inf")


def setitem(x):
    x[x < 0] = 0
    return x


def setitem_at(x):
    x[torch.where(x < 0)] = 0
    return x


def minus_in_place(x):
    x -= x * (x < 0)
    return x


def times_in_place(x):
    x *= x > 0
    return x


def mask_times_in_place(x):
    mask = (x > 0).to(x.dtype)
    mask *= x
    return mask


def mask_turned(x):
    mask = x > 0
    mask.logical_not_()
    return x * mask


def mask_of_inference(x):
    with torch.inference_mode():
        mask = x > 0
    return x * 1 if mask.any() else x


def half_in_place(x):
    x[:, 2:].relu_()
    return torch.cat([x[:, :2].relu(), x[:, 2:]], 1)


def mask_in_place(x):
    x *= 1 - (x < 0).to(x.dtype)
    return x


def sign_in_place(x):
    return x * x.sign().add_(1).div_(2)


def each_in_place(function, other):
    def call(x):
        function([x], other)
        return x

    return call


def sign_changed(x):
    mask = x.detach().sign().clamp(min=0)
    mask.mul_(torch.full_like(mask, 0.5))
    return x * mask


def few_places(x):
    corner = x[:1, :1, :4, :4] * 1
    return x + (corner * (corner > -corner)).sum()


# name: (what is called on a tensor that may be overwritten, the upper bound)
SPELLINGS = {
    "nn.ReLU": (nn.ReLU(), INF),
    "nn.ReLU(inplace)": (nn.ReLU(inplace=True), INF),
    "F.relu": (F.relu, INF),
    "F.relu(inplace)": (lambda x: F.relu(x, inplace=True), INF),
    "F.relu_": (F.relu_, INF),
    "torch.relu": (torch.relu, INF),
    "torch.relu_": (torch.relu_, INF),
    "Tensor.relu": (lambda x: x.relu(), INF),
    "Tensor.relu_": (lambda x: x.relu_(), INF),
    "relu=": (lambda x: F.relu(input=x), INF),
    "nn.ReLU6": (nn.ReLU6(), 6),
    "F.relu6(inplace)": (lambda x: F.relu6(x, True), 6),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6), 6),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, 0, 2), 2),
    "nn.Hardtanh": (nn.Hardtanh(0, INF), INF),
    "nn.Threshold": (nn.Threshold(0, 0), INF),
    "F.threshold(inplace)": (lambda x: F.threshold(x, 0, 0, True), INF),
    "torch.threshold": (lambda x: torch.threshold(x, 0, 0), INF),
    "F.threshold_": (lambda x: F.threshold_(x, 0.0, 0.0), INF),
    "clamp(min)": (lambda x: x.clamp(min=0), INF),
    "clamp(0)": (lambda x: torch.clamp(x, 0.0), INF),
    "clamp(0, 6)": (lambda x: x.clamp(0, 6), 6),
    "clamp_": (lambda x: x.clamp_(min=0), INF),
    "clamp(tensor)": (lambda x: x.clamp(min=torch.zeros(())), INF),
    "clip": (lambda x: torch.clip(x, 0), INF),
    "clip_": (lambda x: x.clip_(min=0), INF),
    "clamp_min": (lambda x: x.clamp_min(0), INF),
    "clamp_min_": (lambda x: torch.clamp_min_(x, 0), INF),
    "clamp_min(tensor)": (lambda x: torch.clamp_min(x, zeros(x)), INF),
    "maximum": (lambda x: torch.maximum(x, zeros(x)), INF),
    "maximum(0, x)": (lambda x: torch.maximum(torch.zeros(()), x), INF),
    "fmax": (lambda x: x.fmax(torch.zeros(())), INF),
    "torch.max": (lambda x: torch.max(x, torch.zeros(())), INF),
    "Tensor.max": (lambda x: zeros(x).max(x), INF),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.0), INF),
    "nn.LeakyReLU(inplace)": (nn.LeakyReLU(0, inplace=True), INF),
    "rrelu": (lambda x: F.rrelu(x, 0.0, 0.0), INF),
    "elu": (lambda x: F.elu(x, 0.0), INF),
    "prelu": (lambda x: F.prelu(x, torch.zeros(1, dtype=x.dtype)), INF),
    "where": (lambda x: torch.where(x > 0, x, 0.0), INF),
    "where(x >= 0)": (lambda x: torch.where(x >= 0, x, zeros(x)), INF),
    "where(x < 0)": (lambda x: torch.where(x < 0, zeros(x), x), INF),
    "where(not)": (lambda x: torch.where(~(x <= 0), x, 0), INF),
    "where(0 < x)": (lambda x: torch.where(torch.lt(zeros(x), x), x, 0), INF),
    "Tensor.where": (lambda x: x.where(x.gt(0), 0), INF),
    "x * (x > 0)": (lambda x: x * (x > 0), INF),
    "(x > 0) * x": (lambda x: (x > 0) * x, INF),
    "x * mask.float": (lambda x: torch.mul(x, (x.detach() > 0).to(x.dtype)), INF),
    "mask.clone": (lambda x: x * (x > 0).clone().contiguous(), INF),
    "mask.reshape": (lambda x: x * (x > 0).reshape(x.shape).view(x.shape).double(), INF),
    "mask.view_as": (lambda x: x * (x > 0).view_as(x).expand_as(x).reshape_as(x), INF),
    "x *= x > 0": (times_in_place, INF),
    "mul_": (lambda x: x.mul_(torch.gt(x, other=0).type_as(x)), INF),
    "mask *= x": (mask_times_in_place, INF),
    "mask.mul_(x)": (lambda x: (x > 0).type_as(x).mul_(x), INF),
    "mask.multiply_(x)": (lambda x: (x > 0).type_as(x).multiply_(other=x), INF),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 0), INF),
    "masked_fill_": (lambda x: x.masked_fill_(torch.le(x, 0), 0.0), INF),
    "x[x < 0] = 0": (setitem, INF),
    "x[where(x < 0)] = 0": (setitem_at, INF),
    "index_put(mask)": (lambda x: x.index_put((x < 0,), torch.zeros(()).to(x)), INF),
    "index_put(nonzero)": (lambda x: x.index_put((x < 0).nonzero(as_tuple=True), torch.zeros(()).to(x)), INF),
    "x - x * (x < 0)": (lambda x: x - x * (x < 0), INF),
    "x - (x <= 0) * x": (lambda x: torch.sub(x, (x <= 0).to(x) * x), INF),
    "x -= x * (x < 0)": (minus_in_place, INF),
    "aten.relu": (aten.relu, INF),
    "aten.relu.default": (aten.relu.default, INF),
    "aten.relu_.default": (aten.relu_.default, INF),
    "aten.clamp.default": (lambda x: aten.clamp.default(x, 0), INF),
    "aten.hardtanh.default": (lambda x: aten.hardtanh.default(self=x, min_val=0, max_val=6), 6),
    "view": (lambda x: x.view(len(x), -1).relu_().view_as(x), INF),
    "part": (lambda x: torch.cat([x[:, :2].clone().relu_(), x[:, 2:].relu()], 1), INF),
    "half in place": (half_in_place, INF),
    "addcmul": (lambda x: torch.addcmul(zeros(x), x, (x > 0).to(x)), INF),
    "addcmul(mask, x)": (lambda x: x.new_zeros(()).addcmul((x > 0).to(x), x), INF),
    "addcmul_": (lambda x: zeros(x).addcmul_(x, (x > 0).to(x)), INF),
    "heaviside": (lambda x: x * torch.heaviside(x.detach(), x.new_zeros(())), INF),
    "heaviside(0.5)": (lambda x: x * x.detach().heaviside(values=x.new_full((), 0.5)), INF),
    "einsum(...)": (lambda x: torch.einsum("..., ... -> ...", x, (x > 0).to(x)), INF),
    "einsum": (lambda x: torch.einsum("nchw,nchw->nchw", (x > 0).to(x), x), INF),
    "foreach_clamp_min": (lambda x: torch._foreach_clamp_min([x], 0)[0], INF),
    "foreach_clamp_min_": (each_in_place(torch._foreach_clamp_min_, 0), INF),
    "foreach_maximum": (lambda x: torch._foreach_maximum((x,), (zeros(x),))[0], INF),
    "foreach_maximum(0)": (lambda x: torch._foreach_maximum([x], 0)[0], INF),
    "foreach_mul": (lambda x: torch._foreach_mul([x], [x > 0])[0], INF),
    "masked_scatter": (lambda x: x.masked_scatter(x < 0, zeros(x)), INF),
    "masked_scatter_": (lambda x: x.masked_scatter_(x < 0, zeros(x)), INF),
    "x * (1 - mask)": (lambda x: x * (1 - (x < 0).float()), INF),
    "x * (ones - mask)": (lambda x: x * (torch.ones_like(x) - (x < 0).to(x)), INF),
    "x * (-mask + 1)": (lambda x: x * (-(x < 0).to(x) + 1), INF),
    "x *= 1 - mask": (mask_in_place, INF),
    "mask * 1.0": (lambda x: x * (1.0 * (x > 0)), INF),
    "mask ^ True": (lambda x: x * ((x < 0) ^ True), INF),
    "mask == False": (lambda x: x * ((x < 0) == False), INF),  # noqa: E712
    "where(mask, 1, 0)": (lambda x: x * torch.where(x > 0, 1.0, 0.0), INF),
    "mask.where(ones, zeros)": (lambda x: x * torch.ones_like(x).where(x > 0, zeros(x)), INF),
    "sign.clamp": (lambda x: x * x.sign().clamp(min=0), INF),
    "sign.relu": (lambda x: x * x.sign().relu(), INF),
    "mask.sign": (lambda x: x * (x > 0).to(x).sign(), INF),
    "relu(sign)": (lambda x: torch.relu(x.detach().sign()) * x, INF),
    "sign == 1": (lambda x: x * (x.sign() == 1), INF),
    "where(sign > 0)": (lambda x: torch.where(x.sign() > 0, x, 0), INF),
    "(sign + 1) / 2": (lambda x: x * ((torch.sign(x) + 1) / 2), INF),
    "sgn": (lambda x: x * x.sgn().add(1).div(2), INF),
    "sign.add_.div_": (sign_in_place, INF),
    "signbit": (lambda x: x * ~x.signbit(), INF),
    "masked_fill(signbit)": (lambda x: x.masked_fill(torch.signbit(x), 0), INF),
    "maximum(x, x * 0)": (lambda x: torch.maximum(x, x * 0), INF),
    "max(0 * x, x)": (lambda x: torch.max(0 * x, x), INF),
    "where(x > 0, x, x * 0)": (lambda x: torch.where(x > 0, x, x * 0), INF),
}  # fmt: skip

# what only the values of a mask tell; the upper bound is infinity
BY_VALUES = {
    "x > -x": lambda x: x * (x > -x),
    "2 * x > 0": lambda x: (2 * x > 0) * x,
    "x > 0 of a copy": lambda x: x * (x.half() > 0),
    "exp": lambda x: x * (x.exp() > 1),
    "x == |x|": lambda x: x.mul_(x == x.abs()),
    "NumPy": lambda x: x * torch.from_numpy(x.detach().numpy() > 0),
    "where": lambda x: torch.where(x + x > 0, x, 0),
    "where else": lambda x: torch.where(x.tanh() < 0, zeros(x), x),
    "masked_fill": lambda x: x.masked_fill(3 * x < 0, 0),
    "set item": lambda x: x.index_put((-x > 0,), torch.zeros(()).to(x)),
    "einsum": lambda x: torch.einsum("...,...->...", x, (x > -x).to(x)),
    "addcmul": lambda x: torch.addcmul(zeros(x), x, (x > -x).to(x)),
}

# what looks like a ReLU and is none
OTHERS = {
    "nn.LeakyReLU": nn.LeakyReLU(0.1),
    "clamp(min=-1)": lambda x: x.clamp(min=-1),
    "clamp(max)": lambda x: x.clamp(max=0.1),
    "hardtanh": F.hardtanh,
    "maximum": lambda x: torch.maximum(x, torch.full((), -0.1, dtype=x.dtype)),
    "elu": F.elu,
    "where": lambda x: torch.where(x > 0.1, x, 0),
    "where else": lambda x: torch.where(x > 0, x, x * 0.1),
    "mask": lambda x: x * torch.ones_like(x),
    "mask of another": lambda x: x * (x - 0.1 > 0),
    "mask turned": mask_turned,
    "mask of places": lambda x: x * (torch.arange(x.numel()).view_as(x) % 3 > 0),
    "all but one place": lambda x: x * (x > -x).index_fill(3, torch.zeros(1, dtype=torch.int64), True),
    "negative values": lambda x: x * (x < -x),
    "half of a mask": lambda x: x * (0.5 * (x > -x).to(x)),
    "few places": few_places,
    "above zero": lambda x: x.square() * (x.square() > 0.0 * x + 0.1).logical_or(x > -9),
    "mask of inference": mask_of_inference,
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0),
    "dimension": lambda x: x.max(1, keepdim=True).values + x,
    "dimension 0": lambda x: torch.max(x, 0).values + x,
    "prelu": nn.PReLU(init=0.1).double(),
    "leaky by a mask": lambda x: x * (0.1 + 0.9 * (x > 0)),
    "magnitude": lambda x: x * x.sign(),
    "sign": lambda x: x * x.detach().sign().clamp(min=-0.5),
    "sign changed": sign_changed,
    "inverted bits": lambda x: x * ~(x < 0).int(),
    "positive masked": lambda x: x * (1 - (x > 0).to(x)),
    "addcmul": lambda x: torch.addcmul(torch.ones_like(x), x, (x > 0).to(x)),
    "addcmul(value)": lambda x: torch.addcmul(zeros(x), x, (x > 0).to(x), value=2),
    "einsum": lambda x: torch.einsum("nchw,nchw->nhwc", x, (x > 0).to(x)).permute(0, 3, 1, 2),
    "masked_scatter": lambda x: x.masked_scatter(x < 0, torch.ones_like(x)),
    "foreach": lambda x: torch._foreach_clamp_min([x], -1)[0],
    "softsign": lambda x: x / (1 + x.abs()),
    "leaky by magnitude": lambda x: 0.6 * x + 0.4 * x.abs(),
    "magnitude of another": lambda x: x + (x - 1).abs(),
    "normalised": lambda x: x / x.abs().amax((1, 2, 3), keepdim=True),
    "maxout": lambda x: torch.stack([x, x.flip(1)]).amax(0) + torch.stack([x, -x], 1).max(1).values,
    "stack of constants": lambda x: torch.stack([x, torch.full_like(x, 0.1)]).amax(0),
    "leaky by subtraction": lambda x: x - 0.9 * (x * (x < 0)),
    "subtraction of another": lambda x: x - x.sub(1) * (x.sub(1) < 0),
    "some places": lambda x: x.index_put((x > 0).nonzero(as_tuple=True)[:1], zeros(x)[0, 0, 0]),
    "max over constants": lambda x: torch.stack([x, torch.full_like(x, 0.1)]).max(0).values,
    "topk over constants": lambda x: torch.stack([x, torch.full_like(x, 0.1)]).topk(1, 0).values[0],
    "tokens": lambda x: x + torch.cat([zeros(x)[:, :2], x], 1).amax(1, keepdim=True),
    "stack elsewhere": lambda x: torch.stack([x, zeros(x)]).amax(1, keepdim=True).sum(0) + x,
}
