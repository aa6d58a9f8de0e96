"""A task in the shape of Flower's PyTorch quickstart: a small CNN, loaders whose batches are dictionaries.

The images are generated, three colour channels of 32x32 in which each class is a pattern.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

PATTERNS = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Patterns(Dataset):
    def __init__(self, seed, size):
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 10, (size,), generator=draw)
        noise = torch.randn(size, 3, 32, 32, generator=draw)
        self.images = 0.5 * PATTERNS[self.labels] + noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"img": self.images[index], "label": self.labels[index]}


def load_data(partition_id, num_partitions, batch_size):
    train = Patterns(1 + partition_id, 400 // num_partitions)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(Patterns(0, 100), batch_size)


def load_centralized_dataset():
    return DataLoader(Patterns(0, 100), 50)


def train(net, trainloader, epochs, lr, device):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for batch in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch["img"].to(device)), batch["label"].to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test(net, testloader, device):
    net.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for batch in testloader:
            outputs = net(batch["img"].to(device))
            labels = batch["label"].to(device)
            loss += F.cross_entropy(outputs, labels).item()
            correct += int((outputs.argmax(1) == labels).sum())
    return loss / len(testloader), correct / len(testloader.dataset)
