"""Tasks that use what a task may have beside the five methods: lengths, validation, saving, predictions, notes."""

import csv

import torch
import torch.nn.functional as F
from my_task import MyTask, Net
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.exact.splits import Split


class WithValidation(MyTask):
    """Learns fast, then overfits: its best model on validation is not its last."""

    best_metric = ("accuracy", "max")

    def __init__(self, hidden=64, dropout=0.0, noise=0.0, labels_wrong=0.3):
        super().__init__(hidden, dropout, noise)
        self.labels_wrong = labels_wrong

    def splits(self):
        whole = super().splits()["train"]
        wrong = torch.rand(500, generator=torch.Generator().manual_seed(1)) < self.labels_wrong
        y = torch.where(wrong, 1 - whole["y"], whole["y"])
        cuts = {"train": slice(0, 300), "validation": slice(300, 400), "test": slice(400, 500)}
        return {name: {"x": whole["x"][cut], "y": y[cut]} for name, cut in cuts.items()}


class Bag(nn.Module):
    """The mean of its words' vectors, without the padding, then a head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)
        self.widths = []

    def forward(self, words, mask):
        self.widths.append(words.shape[1])
        mean = (self.words(words) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(F.dropout(self.norm(mean), 0.1, self.training))


class Words(MyTask):
    """Sentences of 1 to 12 words, padded, weighted by their lengths; what the padding holds must not matter."""

    def __init__(self, garbage=0):
        self.garbage = garbage

    def splits(self):
        random = torch.Generator().manual_seed(3)
        lengths = torch.randint(1, 13, (260,), generator=random)
        words = torch.randint(0, 50, (260, 12), generator=random)
        mask = (torch.arange(12) < lengths[:, None]).float()
        y = (words[:, 0] % 2).long()
        words = torch.where(mask.bool(), words, self.garbage)
        whole = {"words": words, "mask": mask, "y": y}

        def part(cut):
            arrays = {name: array[cut] for name, array in whole.items()}
            return Split(arrays, lengths[cut].float(), lengths[cut], ("words", "mask"))

        return {"train": part(slice(0, 200)), "test": part(slice(200, 260))}

    def model(self):
        return Bag()

    def augment(self, batch, random):
        return batch

    def forward(self, model, batch):
        return model(batch["words"], batch["mask"])

    def loss(self, outputs, batch):
        weight = batch["mask"].sum(1)
        return (F.cross_entropy(outputs, batch["y"], reduction="none") * weight).sum(), weight.sum()

    def metrics(self, outputs, batch):
        return {"accuracy": (outputs.argmax(1) == batch["y"]).float().mean().item()}


class Predicts(WithValidation):
    """Saves and loads in a format of its own, and says something at the start."""

    def __init__(self, hidden=8, names=("no", "yes")):
        super().__init__(hidden, 0.0, 0.0)
        self.names = list(names)
        self.notes = []

    def model(self):
        self.notes.append("three samples look odd")
        return Net(self.hidden, self.dropout)

    def save(self, model, folder):
        save_file(dict(model.state_dict()), str(folder / "weights.safetensors"))

    def load(self, folder):
        model = Net(self.hidden, self.dropout)
        model.load_state_dict(load_file(str(folder / "weights.safetensors")))
        return model

    def predict(self, model, source, batch_size):
        with source.open() as file:
            rows = [[float(v) for v in row] for row in csv.reader(file)]
        for start in range(0, len(rows), batch_size):
            for row in model(torch.tensor(rows[start : start + batch_size])).argmax(1).tolist():
                yield {"label": self.names[row]}

    def pictures(self, outputs, batch):
        return {"logits": torch.zeros(3, 4, 5, dtype=torch.uint8)}


class Pulls(MyTask):
    """A linear loss: the gradient of a sample is the sample itself, whatever the weights are by then."""

    def splits(self):
        generator = torch.Generator().manual_seed(3)
        x = 0.1 + torch.randn(500, 20, generator=generator)
        return {"train": {"x": x}, "test": {"x": x[:50]}}

    def model(self):
        model = nn.Linear(20, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def augment(self, batch, random):
        return batch

    def forward(self, model, batch):
        return {"pull": model(batch["x"])[:, 0]}

    def loss(self, outputs, batch):
        return outputs["pull"].sum(), len(batch["x"])

    def metrics(self, outputs, batch):
        return {}
