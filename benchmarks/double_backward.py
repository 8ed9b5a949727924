import argparse, contextlib, time, statistics, sys, torch, torchvision
import torch.nn.functional as F
from salnb.double_backward import fast_double_backward


def baseline(model, images, target):
    F.cross_entropy(model(images), target).backward()


def saliency(model, images, target, ctx=contextlib.nullcontext):
    images = images.detach().requires_grad_()
    with ctx():
        logits = model(images)
        ce = F.cross_entropy(logits, target)
        score = logits.gather(1, target[:, None]).sum()
        (g,) = torch.autograd.grad(score, images, create_graph=True)
        m = g.abs().amax(1, keepdim=True)
        m = m / m.amax((2, 3), keepdim=True)
        a, b = m.chunk(2)
        loss = ce + (a - b).square().mean()
    loss.backward()


def z(model):
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    cfg = {"resnet18": (32, 112), "resnet50": (32, 64), "vgg16_bn": (32, 64), "densenet121": (32, 64)}
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else cfg
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    for name in names:
        n, s = cfg[name]
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None)
        model.train()
        x = torch.randn(n, 3, s, s)
        t = torch.randint(0, 1000, (n,))
        steps = {
            "base": lambda: baseline(model, x, t),
            "eager": lambda: saliency(model, x, t),
            "fast": lambda: saliency(model, x, t, fast_double_backward),
        }
        if len(sys.argv) > 3:
            steps.pop("eager")
        ts = {k: [] for k in steps}
        for r in range(rounds + 1):
            for k, f in steps.items():
                z(model)
                a = time.perf_counter()
                f()
                if r:
                    ts[k].append(time.perf_counter() - a)
        md = {k: statistics.median(v) for k, v in ts.items()}
        print(name, {k: f"{v:.3f}s {v / md['base']:.3f}" for k, v in md.items()}, flush=True)
