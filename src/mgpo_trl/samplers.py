"""Order of the rows in an epoch."""

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """
    TRL's sampler, with an order that depends on the seed and the epoch alone.

    TRL draws each epoch's order from one running generator, so a run that is resumed in its second epoch would go
    through the first epoch's order again: some rows twice, others never.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]):
            TRL's sampler.
        epoch (`Callable[[], int]`):
            Tells the current epoch when an epoch starts.
    """

    def __init__(self, sampler, epoch: Callable[[], int]):
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
