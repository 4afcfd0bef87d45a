"The cluster on paper: bytes on links, stragglers, failures, and the layouts that follow from them."

import math
import random
from dataclasses import replace

import pytest

from vlmrlhf_course.scale.cluster import (
    LAYOUTS,
    Load,
    cluster_iteration,
    compare_layouts,
    expected_longest,
    fits,
    forward_flops,
    gather_seconds,
    in_layout,
    lost_share,
    reduce_seconds,
    ring_seconds,
    slowest_link,
    token_seconds,
    update_flops,
    young,
    young_daly,
)
from vlmrlhf_course.scale.launching import PlanConfig, Rates
from vlmrlhf_course.scale.planner import GB, learned_weights
from vlmrlhf_course.scale.shapes import weights

SEVEN = PlanConfig("7b", gpus=8, answers=512, answers_per_prompt=8, micro_batch=16, rollout=32)
RATES = Rates()


# --- links ----------------------------------------------------------------------------------------


def test_a_ring_by_hand():
    "Four processes, 8 bytes: each sends three quarters of it."
    assert ring_seconds(8, 4, 1) == 6
    assert ring_seconds(8, 1, 1) == 0


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_counts_what_a_simulated_one_sends(n):
    "Chunk by chunk: in n − 1 rounds each process hands one of n chunks on."
    size, rate, sent = 24.0, 2.0, 0.0
    for _ in range(n - 1):
        sent += size / n
    assert ring_seconds(size, n, rate) == pytest.approx(sent / rate)


def test_what_crosses_the_network_in_each_layout():
    cfg = replace(SEVEN, nodes=4)
    size = 10 * GB
    assert slowest_link(cfg, RATES) == RATES.network * GB
    assert gather_seconds(size, cfg, "copies", RATES) == 0
    assert gather_seconds(size, cfg, "workers", RATES) == 0
    assert gather_seconds(size, cfg, "zero3", RATES) == pytest.approx(10 * 31 / 32 / 50)
    assert gather_seconds(size, cfg, "hybrid", RATES) == pytest.approx(10 * 7 / 8 / 450)
    copies, shared = (reduce_seconds(size, cfg, x, RATES) for x in ("copies", "zero3"))
    assert copies == pytest.approx(2 * shared)  # a reduce-scatter, and a gather
    hybrid = reduce_seconds(size, cfg, "hybrid", RATES)
    assert hybrid == pytest.approx(10 * 7 / 8 / 450 + 2 * (10 / 8) * 3 / 4 / 50)


# --- stragglers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, mean, deviation, limit", [(1, 40, 20, 400), (50, 90, 45, 256)])
def test_the_longest_of_many_is_what_drawing_gives(n, mean, deviation, limit):
    rng, spread = random.Random(1), math.log(1 + (deviation / mean) ** 2)
    middle = math.log(mean) - spread / 2
    tries = [
        min(limit, max(rng.lognormvariate(middle, math.sqrt(spread)) for _ in range(n)))
        for _ in range(2000)
    ]
    found = expected_longest(n, mean, deviation, limit)
    assert found == pytest.approx(sum(tries) / len(tries), rel=0.03)


def test_the_longest_grows_up_to_the_limit():
    found = [expected_longest(n, 100, 40, 256) for n in (1, 8, 64, 512, 10**6)]
    assert found == sorted(found) and found[-1] == pytest.approx(256, abs=1)
    assert expected_longest(100, 300, 0, 256) == 256


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("write, mtbf", [(30, 3600), (60, 86_400)])
def test_youngs_interval_loses_least(write, mtbf):
    best = young(write, mtbf)
    every = [best * f for f in (0.3, 0.7, 1, 1.5, 3)]
    lost = [lost_share(t, write, mtbf, 600) for t in every]
    assert min(lost) == lost[2]


def test_dalys_terms_by_hand():
    "δ = 100, M = 5000: √(2δM) = 1000, √(δ/2M) = 0.1."
    assert young_daly(100, 5000) == pytest.approx(1000 * (1 + 0.1 / 3 + 0.01 / 9) - 100)
    assert young_daly(100, 40) == 40


def test_a_checkpoint_interval_by_simulation():
    "Work of 10⁶ s under random failures takes what `lost_share` says."
    write, mtbf, restart = 20.0, 4000.0, 100.0
    every, rng = young(write, mtbf), random.Random(0)
    done = clock = 0.0
    failure = rng.expovariate(1 / mtbf)
    while done < 1e6:
        end = clock + every + write
        if failure < end:
            clock = failure + restart
            failure = clock + rng.expovariate(1 / mtbf)
        else:
            clock, done = end, done + every
    lost = 1 - done / clock
    assert lost == pytest.approx(lost_share(every, write, mtbf, restart), rel=0.15)


# --- iterations -----------------------------------------------------------------------------------


def test_flops_of_one_token_are_two_a_weight():
    read = weights("7b", 0, 16, "head").language - 32064 * 4096
    assert forward_flops(SEVEN, 0, 1) == pytest.approx(2 * read, rel=1e-3)
    shared = forward_flops(SEVEN, 640, 0, shared=8)
    assert shared == pytest.approx(forward_flops(SEVEN, 640, 0) / 8)


def test_flops_of_an_update_count_passes():
    lora = update_flops(SEVEN, 1, 100)
    once = forward_flops(SEVEN, 640, 100, 8)
    assert lora == pytest.approx(3 * once)  # forward, again, and back
    assert update_flops(replace(SEVEN, checkpointing=False), 1, 100) == pytest.approx(2 * once)
    assert update_flops(replace(SEVEN, route="full"), 3, 100) == pytest.approx(3 * 4 * once)
    assert update_flops(replace(SEVEN, critic="adapter"), 1, 100) == pytest.approx(6 * once)


def test_a_token_waits_for_memory_or_for_python():
    slow, fast = (token_seconds(SEVEN, "copies", Rates(launch=x)) for x in (3.4e-3, 0.0))
    assert slow == pytest.approx(32 * 3.4e-3)
    assert 14.1 / 3350 < fast < slow
    sharded = replace(SEVEN, zero=3)
    gathered = replace(sharded, gather=True)
    assert token_seconds(sharded, "zero3", RATES) > token_seconds(gathered, "zero3", RATES)


def test_an_iterations_parts_add_up_and_are_paid():
    done = cluster_iteration(SEVEN, "copies")
    assert done.seconds == pytest.approx(sum(done[:6])) and min(done) >= 0
    paid = done.seconds * 8 * RATES.dollars / 3600 / 512 * 1000
    assert done.dollars == pytest.approx(paid)
    assert f"{done.seconds:.1f} s" in done.in_words()
    faster = cluster_iteration(SEVEN, "copies", Rates(mfu=0.48))
    assert faster.update == pytest.approx(done.update / 2)
    assert cluster_iteration(SEVEN, "copies", RATES, Load(deviation=0.0)).waiting == 0


def test_more_gpus_break_more_often():
    few, many = (
        cluster_iteration(replace(SEVEN, nodes=n, answers=512 * n), "copies", Rates())
        for n in (1, 512)
    )
    assert many.lost / many.seconds > 5 * few.lost / few.seconds
    assert many.waiting >= few.waiting


def test_workers_take_as_long_as_the_slower_side():
    done = cluster_iteration(SEVEN, "workers")
    alone = cluster_iteration(SEVEN, "copies")
    assert done.update == 0 and done.sampling == pytest.approx(2 * alone.sampling)
    quick = cluster_iteration(SEVEN, "workers", Rates(launch=0.0), Load(worker_share=0.9))
    assert quick.sampling == 0 and quick.update > alone.update


def test_layouts_that_do_not_fit_have_no_figure():
    full = replace(SEVEN, model="13b", route="full", zero=2, rollout=8, micro_batch=8)
    found = compare_layouts(full, (1, 8))
    assert set(found[1]) == set(LAYOUTS) and found[1]["copies"] is None
    assert not fits(in_layout(full, "copies"), "copies")
    assert in_layout(full, "copies").zero == 2 and in_layout(full, "zero3").zero == 3
    lora = compare_layouts(SEVEN, (1,))[1]
    assert all(lora.values()) and lora["copies"].seconds < lora["workers"].seconds
    assert learned_weights(full) > 13e9
