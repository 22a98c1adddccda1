import torch

from kernels.registry import Backend


def weight_gradients(d_outputs, inputs):
    pairs = zip(d_outputs, inputs, strict=True)
    return tuple(torch.mm(d_output.flatten(0, -2).t(), x.flatten(0, -2)) for d_output, x in pairs)


BACKEND = Backend("reference", weight_gradients)
