"""The two networks. They do not depend on how they are trained: edit them freely."""

from torch import Tensor, nn


class NeuralNetwork(nn.Module):
    """Multilayer perceptron: 784 → 512 → 512 → 10 with ReLU in between, as in PyTorch's own tutorial.

    Takes float images (N, 1, 28, 28) or (N, 28, 28); returns logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(28 * 28, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 10) of a batch of images."""
        return self.linear_relu_stack(self.flatten(images))


class ConvolutionalNeuralNetwork(nn.Module):
    """Three convolutions and three fully connected layers, with batch norm and dropout.

    Takes float images (N, 1, 28, 28); returns logits (N, 10). Layers before batch norm have no bias, since batch norm
    subtracts it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()  # unused, so that the network prints like the reference
        self.conv_stack = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1, bias=False),  # 28 × 28
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),  # 14 × 14
            nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),  # 7 × 7
            nn.Conv2d(64, 64, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.fc_stack = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 256, bias=False),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Dropout(0.4),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 10) of a batch of images."""
        return self.fc_stack(self.conv_stack(images))
