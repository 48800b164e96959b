"""The classes of the example models, as one writes them in a notebook. Nothing here knows of nograd.

A model file names them `seed_models:RegressionModel` and so on. `ImageClassifier` and `LSTMModel` fill in the
architectures; the `training_step` methods are only there for `train.py`.
"""

# ruff: noqa: ARG002 - Lightning gives its steps a batch_idx

import lightning.pytorch as pl
import torch
from torch import nn


class RegressionModel(nn.Module):
    def __init__(self, input_size):
        super().__init__()
        self.fc1 = nn.Linear(input_size, 128)
        self.fc2 = nn.Linear(128, 1)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.fc2(x)


class LinearRegressionModel(pl.LightningModule):
    def __init__(self, input_dim, output_dim):
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, x):
        return self.linear(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def predict_step(self, batch, batch_idx):
        x, _ = batch  # Ignore labels during prediction
        return self.forward(x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class ImageClassifier(pl.LightningModule):
    """A small CNN for 8x8 grey images."""

    def __init__(self, num_classes, channels=16):
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),  # a model left in training mode would answer differently every time
        )
        self.classifier = nn.Linear(2 * channels * 4 * 4, num_classes)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def predict_step(self, batch, batch_idx):
        images, _ = batch  # Ignore labels during prediction
        predictions = self(images)  # Forward pass
        return predictions.argmax(dim=1)  # Get class predictions

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


class LSTMModel(pl.LightningModule):
    """Reads a sequence of vectors and answers each of them with a vector."""

    def __init__(self, input_dim, hidden_dim, output_dim):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        self.linear = nn.Linear(hidden_dim, output_dim)

    def forward(self, sequence):
        hidden, state = self.lstm(sequence)
        return self.linear(hidden), state

    def training_step(self, batch, batch_idx):
        sequence, target = batch
        output, _ = self(sequence)
        return nn.functional.mse_loss(output, target)

    def predict_step(self, batch, batch_idx):
        sequence, _ = batch  # Ignore target sequences during prediction
        output, _ = self(sequence)  # Forward pass, get output from LSTM
        return output  # Sequence of predictions

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)
