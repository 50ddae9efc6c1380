import torch

from polyak.demo._tasks import Examples, batches, digits, help_text, with_noise


def rows(examples: Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.inputs}


def test_digits_are_split_without_overlap_and_only_training_labels_are_noisy():
    split = digits(seed=3)
    sizes = [len(part.targets) for part in (split.train, split.validation, split.test)]
    assert sizes == [500, 600, 697]
    assert split.train.inputs.shape == (500, 1, 8, 8)

    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    truth = {image.numpy().tobytes(): int(label) for image, label in zip(images, bunch.target, strict=True)}
    assert len(truth) == len(images), "the images must be distinct for this test to mean anything"

    def wrong(part: Examples) -> int:
        pairs = zip(part.inputs, part.targets, strict=True)
        return sum(truth[image.numpy().tobytes()] != int(label) for image, label in pairs)

    parts = (split.train, split.validation, split.test)
    assert sum(len(rows(part)) for part in parts) == len(set.union(*map(rows, parts))) == 1797
    # A fifth of the labels are drawn anew, and a tenth of those are right by chance.
    assert 60 <= wrong(split.train) <= 120
    assert wrong(split.validation) == wrong(split.test) == 0


def test_splits_follow_the_seed():
    assert torch.equal(digits(1).train.inputs, digits(1).train.inputs)
    assert not torch.equal(digits(1).train.inputs, digits(2).train.inputs)


def test_help_text_tests_on_what_comes_after_the_training_text():
    from pydoc_data.topics import topics

    corpus = "".join(topics.values()).encode()
    split = help_text(seed=0)
    first = bytes(split.train.inputs[0].tolist())
    assert corpus.startswith(first + bytes([split.train.targets[0]]))
    # Windows of nine bytes, the last tenth of them held out: training ends where the first of those begins.
    windows = len(corpus) - 8
    trained_on = len(split.train.targets) + 8
    assert trained_on == windows - windows // 10
    for part in (split.validation, split.test):
        assert len(part.targets) == 10_000
        window = bytes([*part.inputs[0].tolist(), int(part.targets[0])])
        assert window in corpus[trained_on:]


def test_batches_go_through_the_data_epoch_after_epoch():
    examples = Examples(torch.arange(10), torch.arange(10))
    generator = torch.Generator().manual_seed(0)
    taken = [batch.targets.tolist() for batch in batches(examples, 3, steps=6, generator=generator)]
    assert all(len(batch) == 3 for batch in taken)
    first, second = ([row for batch in epoch for row in batch] for epoch in (taken[:3], taken[3:]))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_noise_has_the_deviation_asked_for_and_none_is_none():
    inputs = torch.zeros(10_000)
    generator = torch.Generator().manual_seed(0)
    assert 0.29 < with_noise(inputs, 0.3, generator).std() < 0.31
    assert with_noise(inputs, 0.0, generator) is inputs
