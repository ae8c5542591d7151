"""Samplers against naive reimplementations written from their description."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from errors import UserError
from samplers import EndlessSampler, RASampler, ResumableSampler, ShardSampler


def naive_repeated(count, replicas, rank, epoch, repeats=3, seed=0, shuffle=True):
    """One step of the description after the other, padding included."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator).tolist() if shuffle else list(range(count))
    stretched = []
    for index in order:
        for _ in range(repeats):
            stretched.append(index)
    total = math.ceil(count * repeats / replicas) * replicas
    while len(stretched) < total:
        stretched.append(stretched[len(stretched) - count * repeats])
    mine = [stretched[position] for position in range(rank, total, replicas)]
    return mine[: math.floor(count // 256 * 256 / replicas)]


def over_ranks(count, replicas, epoch=0, **options):
    """What each process yields: a list of lists."""
    samplers = [RASampler(range(count), replicas, rank, **options) for rank in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(256, 1500),
    replicas=st.integers(1, 9),
    epoch=st.integers(0, 400),
    repeats=st.integers(1, 4),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_repeated_augmentation_is_its_description(count, replicas, epoch, repeats, seed, shuffle):
    options = {"seed": seed, "shuffle": shuffle}
    drawn = over_ranks(count, replicas, epoch, num_repeats=repeats, **options)
    for rank, indices in enumerate(drawn):
        assert indices == naive_repeated(count, replicas, rank, epoch, repeats, **options)
        assert len(indices) == len(RASampler(range(count), replicas, rank)) == count // 256 * 256 // replicas


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_repeated_augmentation_is_timms(replicas):
    """timm has no seed; ours is added to the epoch."""
    for count, epoch, seed in ((256, 0, 0), (1000, 3, 0), (1281, 17, 5)):
        expected = [RepeatAugSampler(range(count), replicas, rank) for rank in range(replicas)]
        for sampler in expected:
            sampler.set_epoch(seed + epoch)
        assert over_ranks(count, replicas, epoch, seed=seed) == [list(sampler) for sampler in expected]


@pytest.mark.parametrize("replicas", [3, 4, 5, 8])
def test_copies_go_to_different_ranks(replicas):
    drawn = over_ranks(1111, replicas)
    copies = Counter(index for indices in drawn for index in indices)
    # the cut at the end may leave the last image with fewer copies
    assert sorted(copies.values())[1:] == [3] * (len(copies) - 1)
    for indices in drawn:
        assert len(set(indices)) == len(indices)


def test_one_process_sees_the_copies_in_a_row():
    (indices,) = over_ranks(600, 1)
    assert len(indices) == 512
    assert indices[0::3][:170] == indices[1::3][:170] == indices[2::3][:170]


def test_epochs_and_seeds_change_the_order():
    sampler = RASampler(range(512), 2, 0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    # the epoch and the seed enter as their sum, as with torch's DistributedSampler
    assert list(RASampler(range(512), 2, 0, seed=1)) == second


def test_sampling_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    list(RASampler(range(512), 1, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_process_group_there_is_one_process():
    sampler = RASampler(range(300))
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (1, 0, 256)


def test_process_group_gives_the_defaults(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sampler = RASampler(range(300))
    finally:
        torch.distributed.destroy_process_group()
    assert (sampler.num_replicas, sampler.rank) == (1, 0)


def test_too_few_images_for_repeats():
    with pytest.raises(UserError, match=r"at least 256 training .* 255; give --no-repeated-aug"):
        RASampler(range(255), 1, 0)


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_outside_the_processes(rank):
    with pytest.raises(ValueError, match="not one of 2 processes"):
        RASampler(range(256), 2, rank)
    with pytest.raises(ValueError, match="not one of 2 processes"):
        ShardSampler(range(256), 2, rank)


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="num_repeats"):
        RASampler(range(256), 1, 0, num_repeats=0)


# ------------------------------------------------------------------------------------------------------------
# Copies that stay together


def in_batches(draws, size):
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def draws_of(count, replicas, epoch, together):
    """What each process draws in an epoch: a list of lists."""
    drawn = []
    for rank in range(replicas):
        sampler = ResumableSampler(RASampler(range(count), replicas, rank, seed=3, together=together))
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(256, 1500),
    replicas=st.sampled_from([1, 2, 3, 4, 8]),
    epoch=st.integers(0, 400),
    size=st.integers(1, 100),
)
def test_grouping_changes_no_global_batch(count, replicas, epoch, size):
    """Neither images nor random numbers, the incomplete last batch included; only who gets what."""
    grouped, dealt = draws_of(count, replicas, epoch, size), draws_of(count, replicas, epoch, 0)
    assert [len(draws) for draws in grouped] == [len(draws) for draws in dealt]
    for together, apart in zip(
        zip(*(in_batches(draws, size) for draws in grouped), strict=True),
        zip(*(in_batches(draws, size) for draws in dealt), strict=True),
        strict=True,
    ):
        samples = [
            sorted((draw.image, draw.entropy) for draws in each for draw in draws) for each in (together, apart)
        ]
        assert samples[0] == samples[1]
    for draws in grouped:
        assert [draw.position for draw in draws] == list(range(len(draws)))
    if replicas == 1:
        assert grouped == dealt


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_grouping_keeps_copies_together(replicas):
    """Each process gets neighbours: of a batch of 32 at most two images are shared with other processes."""
    for draws in draws_of(2048, replicas, 1, 32):
        for batch in in_batches(draws, 32):
            places = [draw.entropy[2] for draw in batch]
            assert places == list(range(places[0], places[0] + 32))
            copies = list(Counter(draw.image for draw in batch).values())
            assert set(copies[1:-1]) == {3}
    for draws in draws_of(2048, 4, 1, 0):
        assert len({draw.image for draw in draws}) == len(draws)  # dealt out, they are decoded one by one


# ------------------------------------------------------------------------------------------------------------
# ResumableSampler


def orders(kind, count, replicas, seed=0):
    """One sampler of indices for each process."""
    if kind != "plain":
        together = 20 if kind == "grouped" else 0
        return [RASampler(range(count), replicas, rank, seed=seed, together=together) for rank in range(replicas)]
    return [DistributedSampler(range(count), replicas, rank, shuffle=True, seed=seed) for rank in range(replicas)]


@pytest.mark.parametrize("kind", ["repeated", "grouped", "plain"])
@pytest.mark.parametrize("replicas", [1, 3, 4])
def test_resumable_order_is_the_wrapped_sampler(kind, replicas):
    for wrapped, alone in zip(orders(kind, 500, replicas, 5), orders(kind, 500, replicas, 5), strict=True):
        sampler = ResumableSampler(wrapped)
        for epoch in (0, 7):
            sampler.set_epoch(epoch)
            alone.set_epoch(epoch)
            assert [draw.image for draw in sampler] == list(alone)
            assert len(sampler) == len(alone)


@pytest.mark.parametrize("kind", ["repeated", "grouped", "plain"])
def test_a_start_drops_the_beginning_of_one_pass(kind):
    sampler = ResumableSampler(orders(kind, 400, 2)[1])
    sampler.set_epoch(2)
    whole = list(sampler)
    for start in (0, 1, 100, len(whole)):
        sampler.set_epoch(2, start)
        assert len(sampler) == len(whole)
        assert list(sampler) == whole[start:]
        assert list(sampler) == whole
    sampler.set_epoch(2, 100)
    sampler.set_epoch(3)
    assert len(list(sampler)) == len(whole)
    for start in (-1, len(whole) + 1):
        with pytest.raises(ValueError, match=f"cannot start at {start}"):
            sampler.set_epoch(2, start)


@pytest.mark.parametrize("kind", ["repeated", "grouped", "plain"])
def test_no_two_samples_of_a_run_share_their_entropy(kind):
    seen = []
    for epoch in (0, 1, 2):
        for sampler in map(ResumableSampler, orders(kind, 300, 3)):
            sampler.set_epoch(epoch)
            draws = list(sampler)
            assert [draw.position for draw in draws] == list(range(len(sampler)))
            assert {draw.entropy[:2] for draw in draws} == {(0, epoch)}
            seen += [draw.entropy for draw in draws]
    assert len(set(seen)) == len(seen)
    # an epoch's positions over all processes leave no gap
    assert sorted(place for _, epoch, place in seen if epoch == 1) == list(range(len(seen) // 3))


def test_the_place_over_all_processes_is_that_of_one_process_dealt_out():
    """Plain sampling of a divisible set: R processes at p see what one process sees at p R + r."""
    (alone,) = map(ResumableSampler, orders("plain", 600, 1))
    by_place = {draw.entropy[2]: draw.image for draw in alone}
    for sampler in map(ResumableSampler, orders("plain", 600, 3)):
        assert all(by_place[draw.entropy[2]] == draw.image for draw in sampler)


# ------------------------------------------------------------------------------------------------------------
# ShardSampler


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 61, 121])  # 61 and 121: a remainder for each world size but 1
def test_shards_cover_every_sample_once(count, replicas):
    shards = [ShardSampler(range(count), replicas, rank) for rank in range(replicas)]
    assert sorted(index for shard in shards for index in shard) == list(range(count))
    sizes = [len(shard) for shard in shards]
    assert sizes == [len(list(shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    for rank, shard in enumerate(shards):
        assert all(index % replicas == rank for index in shard)


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 20), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_endless_passes_have_no_seam(count, replicas, samples, seed):
    """All processes and epochs together go through one list of permutations, entry by entry."""
    epochs = 4
    stream = []
    while len(stream) < epochs * samples * replicas:
        generator = torch.Generator().manual_seed(seed + len(stream) // count)
        stream += torch.randperm(count, generator=generator).tolist()
    for rank in range(replicas):
        sampler = EndlessSampler(range(count), replicas, rank, samples, seed)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            first = epoch * samples * replicas
            assert list(sampler) == stream[first + rank : first + samples * replicas : replicas]
            assert len(sampler) == samples


def test_endless_samples_can_be_continued_and_differ_in_their_seeds():
    sampler = ResumableSampler(EndlessSampler(range(5), 2, 1, 12, seed=3))
    sampler.set_epoch(1)
    whole = list(sampler)
    assert len({draw.entropy for draw in whole}) == 12 and [draw.position for draw in whole] == list(range(12))
    sampler.set_epoch(1, start=7)
    assert list(sampler) == whole[7:]
