"""The two networks: their printed structure and the shape of their outputs."""

import pytest
import torch

from models import ConvolutionalNeuralNetwork, NeuralNetwork

REFERENCE_STRUCTURE = """\
ConvolutionalNeuralNetwork(
  (flatten): Flatten(start_dim=1, end_dim=-1)
  (conv_stack): Sequential(
    (0): Conv2d(1, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    (1): BatchNorm2d(32, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    (2): ReLU()
    (3): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    (4): Conv2d(32, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    (5): BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    (6): ReLU()
    (7): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    (8): Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    (9): BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    (10): ReLU()
  )
  (fc_stack): Sequential(
    (0): Flatten(start_dim=1, end_dim=-1)
    (1): Linear(in_features=3136, out_features=256, bias=False)
    (2): BatchNorm1d(256, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    (3): ReLU()
    (4): Dropout(p=0.5, inplace=False)
    (5): Linear(in_features=256, out_features=128, bias=False)
    (6): BatchNorm1d(128, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    (7): ReLU()
    (8): Dropout(p=0.4, inplace=False)
    (9): Linear(in_features=128, out_features=10, bias=True)
  )
)"""


def test_cnn_prints_the_structure_of_the_reference() -> None:
    printed = str(ConvolutionalNeuralNetwork())
    assert printed.replace("affine=True, bias=True", "affine=True") == REFERENCE_STRUCTURE


def test_mlp_has_layers_of_784_512_512_10() -> None:
    assert [str(layer) for layer in NeuralNetwork().linear_relu_stack] == [
        "Linear(in_features=784, out_features=512, bias=True)",
        "ReLU()",
        "Linear(in_features=512, out_features=512, bias=True)",
        "ReLU()",
        "Linear(in_features=512, out_features=10, bias=True)",
    ]


@pytest.mark.parametrize("model_class", [NeuralNetwork, ConvolutionalNeuralNetwork])
def test_output_is_ten_logits_per_image(model_class: type[torch.nn.Module]) -> None:
    assert model_class()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert model_class().eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_mlp_accepts_images_without_a_channel() -> None:
    assert NeuralNetwork()(torch.zeros(3, 28, 28)).shape == (3, 10)
