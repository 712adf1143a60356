import torch
from hypothesis import assume, given, settings, strategies as st

from experiments import batches
from experiments.data import Images


def numbered(count: int) -> Images:
    return Images(
        torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8),
        torch.arange(count),
    )


@given(
    count=st.integers(2, 60),
    batch_size=st.integers(2, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_epochs_have_every_image_once(count: int, batch_size: int, seed: int, epoch: int):
    images = numbered(count)
    found = list(batches.shuffled(images, batch_size, seed=seed, epoch=epoch, augment=False))
    labels = torch.cat([labels for _, labels in found])
    assert len(found) == batches.steps(count, batch_size)
    assert min(len(labels) for _, labels in found) > 1
    assert len(labels) == len(labels.unique()) == count - (count % batch_size == 1)
    assert all((pixels[:, 0, 0, 0] == labels).all() for pixels, labels in found)


@given(
    count=st.integers(2, 60), each=st.integers(1, 6), ranks=st.integers(1, 4), augment=st.booleans()
)
@settings(deadline=None, max_examples=40)
def test_processes_share_the_batches_of_one(count: int, each: int, ranks: int, augment: bool):
    """Parts are equal, and augmented as in one process; only the last batch may lose images."""
    assume(each * ranks > 1)
    images = numbered(count)

    def epoch(rank: int, of: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(
            batches.shuffled(
                images, each * ranks, seed=1, epoch=2, augment=augment, rank=rank, ranks=of
            )
        )

    whole, parts = epoch(0, 1), [epoch(rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {batches.steps(count, each * ranks, ranks)}
    for number, shares in enumerate(zip(*parts, strict=True)):
        assert len({len(labels) for _, labels in shares}) == 1
        for k in range(2):  # pixels, labels
            joined = torch.cat([share[k] for share in shares])
            assert torch.equal(joined, whole[number][k][: len(joined)])
            assert len(whole[number][k]) - len(joined) < (
                ranks if len(whole[number][k]) < each * ranks else 1
            )


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(1)  # the global state has no say
        return torch.cat(
            [
                y
                for _, y in batches.shuffled(
                    numbered(50), 16, seed=seed, epoch=epoch, augment=False
                )
            ]
        ).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_testing_keeps_the_order():
    labels = torch.cat([labels for _, labels in batches.in_sequence(numbered(50), 16)])
    assert labels.tolist() == list(range(50))


def test_augmentation_shifts_and_mirrors():
    pixels = torch.randint(1, 256, (40, 3, 8, 6), dtype=torch.uint8)
    changed = batches.apply_moves(
        pixels, *batches.draw_moves(len(pixels), torch.Generator().manual_seed(1))
    )
    shift, seen = batches.SHIFT, set()
    for before, after in zip(pixels, changed, strict=True):
        framed = torch.zeros(3, 8 + 2 * shift, 6 + 2 * shift, dtype=torch.uint8)
        framed[:, shift:-shift, shift:-shift] = before
        views = {
            (dy, dx, mirrored): framed[:, dy : dy + 8, dx : dx + 6].flip(2)
            if mirrored
            else framed[:, dy : dy + 8, dx : dx + 6]
            for dy in range(2 * shift + 1)
            for dx in range(2 * shift + 1)
            for mirrored in (False, True)
        }
        matching = [key for key, view in views.items() if torch.equal(view, after)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len({dy for dy, _, _ in seen}) > 5
    assert len({dx for _, dx, _ in seen}) > 5
    assert len({mirrored for _, _, mirrored in seen}) == 2
    assert len({(dy, dx) for dy, dx, _ in seen}) > 2 * shift + 1  # each way on its own
