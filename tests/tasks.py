"""Small models of every task, each with data on which it can be trained."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedbasin.strategies.tasks.model_task import TASKS, Task
from fedbasin.strategies.tensors.batches import Batch, forward

WIDTH = 6


class Tail(nn.Module):
    """A network whose output passes one more operation."""

    def __init__(self, width, tail):
        super().__init__()
        self.body, self.head, self.tail = nn.Linear(4, WIDTH), nn.Linear(WIDTH, width), tail

    def forward(self, x):
        return self.tail(self.head(self.body(x).relu()))


class Auxiliary(nn.Module):
    """A network with a second output beside the first."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aside = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.head(hidden), self.aside(hidden)


class Segmenter(nn.Module):
    """A 1x1 convolution at the end."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())


class Reader(nn.Module):
    """A recurrent network that is read at its last step."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(4, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x):
        steps, _ = self.body(x)
        return self.head(steps[:, -1])


def language_model():
    with warnings.catch_warnings():
        # transformers' own, on the newest torch.
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
        )
        return GPT2LMHeadModel(config)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(seed):
    return draw(seed, 16, 4)


def tokens(seed):
    ids = torch.randint(11, (6, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def laplace(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def draw_laplace(outputs):
    return outputs + torch.distributions.Laplace(0.0, 1.0).sample(outputs.shape)


@dataclass(frozen=True)
class Example:
    """A task with a model and data.

    Attributes:
        make: makes the model.
        data: makes one batch from a seed.
        task: the task, or its name, that the app gives; None leaves it to the first batch.
        name: name of the task that is found.
        has_head: whether a last layer can be fitted.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], object]
    name: str
    task: Task | str | None = None
    has_head: bool = True

    def model(self, seed=0):
        torch.manual_seed(seed)
        return self.make()

    def batch(self, seed):
        given = self.data(seed)
        if isinstance(given, dict):
            inputs = {key: value for key, value in given.items() if key != "labels"}
            return Batch(inputs, given["labels"], given["attention_mask"].bool())
        return Batch(*given)

    def train(self, model, seed, steps=3, rate=0.1):
        task = TASKS.get(self.name, self.task)
        for _ in range(steps):
            model.zero_grad()
            loss = task.losses(forward(model, self.batch(seed)), self.batch(seed)).mean()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * parameter.grad
        return loss.item()


def labelled(seed):
    return rows(seed), rows(seed)[:, :3].argmax(1)


EXAMPLES = {
    "classes": Example(lambda: Tail(3, nn.Identity()), labelled, "classification"),
    "log-softmax": Example(lambda: Tail(3, nn.LogSoftmax(dim=1)), labelled, "classification"),
    "temperature": Example(lambda: Tail(3, lambda z: z / 0.5), labelled, "classification"),
    "auxiliary output": Example(Auxiliary, labelled, "classification"),
    "soft cap": Example(lambda: Tail(3, lambda z: 3 * z.tanh()), labelled, "classification", has_head=False),
    "regression": Example(lambda: Tail(2, nn.Identity()), lambda s: (rows(s), rows(s)[:, :2] ** 2), "regression"),
    "one number": Example(lambda: Tail(1, nn.Identity()), lambda s: (rows(s), rows(s).sum(1)), "regression"),
    "labels": Example(lambda: Tail(4, nn.Identity()), lambda s: (rows(s), (rows(s) > 0).float()), "multi-label"),
    "one label": Example(lambda: Tail(1, nn.Identity()), lambda s: (rows(s), (rows(s)[:, :1] > 0).float()), "multi-label"),
    "pixels": Example(Segmenter, lambda s: (draw(s, 3, 1, 5, 5), (draw(s, 3, 5, 5) > 0).long()), "pixels"),
    "steps": Example(Reader, lambda s: (draw(s, 9, 5, 4), draw(s, 9, 5, 4).sum(1)[:, :3].argmax(1)), "classification"),
    "text": Example(language_model, tokens, "language-modelling", has_head=False),
    "own loss": Example(
        lambda: Tail(2, nn.Identity()),
        lambda s: (rows(s), rows(s)[:, :2]),
        "own loss",
        Task.of_loss(laplace, draw_laplace),
        has_head=False,
    ),
}  # fmt: skip

# The mean absolute error of torch, in the form that a task's loss must not have.
MEAN_LOSS = F.l1_loss
