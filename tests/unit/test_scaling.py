"""The formula of bytes on the wire, what the kernel counts, and the tables that are made of both."""

import json
import os
import sys
from pathlib import Path

import pytest
import ranks
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402
import projection  # noqa: E402
from engines import build  # noqa: E402
from wire import bytes_sent  # noqa: E402

from gdd_dist.models.discriminator import Discriminator  # noqa: E402
from gdd_dist.models.generator import Generator  # noqa: E402
from gdd_dist.runtime.world import World  # noqa: E402


def networks():
    shape = {"classes": 10, "channels": 3, "size": 16, "width": 96}
    return Generator(**shape), Discriminator(**shape)


def exchange(_rank):
    """Bytes that this rank sends as both networks' gradients are reduced under DDP, and the vote."""
    world, port = World("cpu").join(), int(os.environ["MASTER_PORT"])
    generator, discriminator = networks()
    labels = torch.zeros(1, dtype=torch.int64)
    engines = {
        build(generator, world, "ddp", "float32"): torch.zeros(1, 64),
        build(discriminator, world, "ddp", "float32"): torch.zeros(1, 3, 16, 16),
    }
    world.barrier()
    before = bytes_sent(port)
    vote = world.vote()
    for engine, example in engines.items():
        engine.backward(engine(example, labels).sum())
    vote.result()
    world.barrier()
    sent = bytes_sent(port) - before
    for engine in engines:
        engine.close()
    world.close()
    return sent


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_send_what_the_formula_says(tmp_path, size):
    payload = projection.payload(*map(projection.parameters, networks()))
    assert payload > 500_000
    counted = sum(ranks.call(tmp_path, size, exchange))
    assert counted == pytest.approx(size * projection.sent_by_a_rank(payload, size), rel=0.02)


def test_one_rank_sends_nothing_and_all_together_a_payload_forth_and_back_for_each_but_one():
    assert projection.sent_by_a_rank(100.0, 1) == 0
    for n in (2, 8, 4096):
        assert n * projection.sent_by_a_rank(100.0, n) == pytest.approx(2 * (n - 1) * 100.0)


def test_work_is_counted_as_two_operations_a_multiplication():
    with torch.device("meta"), projection.Counter() as counter:
        torch.nn.functional.conv2d(torch.zeros(2, 6, 8, 8), torch.zeros(12, 3, 3, 3), padding=1, groups=2)
    assert counter.flops == 2 * (2 * 8 * 8 * 12 * 3 * 3 * 3)


def test_the_backward_of_a_convolution_costs_two_forwards_transposed_or_not():
    for conv in (torch.nn.Conv2d(6, 12, 3, stride=2, groups=2), torch.nn.ConvTranspose2d(6, 12, 4, 2, 1)):
        flops = []
        for backward in (False, True):
            with projection.Counter() as counter:
                out = conv(torch.zeros(2, 6, 9, 9, requires_grad=True))
                if backward:
                    out.sum().backward()
            flops.append(counter.flops)
        assert flops[1] == 3 * flops[0]


def test_ddps_buckets_are_one_of_a_mebibyte_then_of_25():
    assert [projection.buckets(n) for n in (1, 2**18, 2**18 + 1, 2**18 + 25 * 2**18 + 1)] == [1, 1, 2, 3]


def test_the_tables_of_the_docs_are_what_the_commands_print():
    assert projection.tables() in (ROOT / "docs/scaling.md").read_text()
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/memory.jsonl").read_text().splitlines()]
    assert memory.table(lines) in (ROOT / "docs/engines.md").read_text()
