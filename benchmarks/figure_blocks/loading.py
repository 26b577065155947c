"""Figures of reading data: the loader, waiting for data, order, hostile archives."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from figure_blocks.records import lines, only, table


def loader() -> str:
    def ratio(benchmark: str) -> str:
        return f"{only('loader.json', benchmark)['ratio']:.1f} ×"

    one, others = only("loader.json", "loader/process"), only("loader.json", "loader/all")["other"]
    best = max(others, key=lambda name: others[name]).partition("/")[0].replace("ImageFolder", "ImageFolder with PIL")
    bare = [o["ratio"] for o in lines("loader.json", "loader/bare")]
    resident = {o["settings"]["ours"][-1]: o["ratio"] for o in lines("loader.json", "loader/resident")}
    mosaic = only("loader-mosaic.json", "loader/all")["other"]
    shorter = [
        o["ratio"]
        for n in ("loader-shorter.json", "loader-mosaic.json")
        for o in lines(n, "loader/all")
        if o["benchmark"] == "loader/all"
    ]
    rows = [
        [label, ratio(f"loader/process{name}"), ratio(f"loader/all{name}")]
        for label, name in (
            (f"{best} (the best of them)", ""),
            ("webdataset", ", webdataset"),
            ("webdataset that shuffles", ", shuffled webdataset"),
        )
    ]
    return (
        table(["images/s of ours over", "one process each", "the other at its best number of workers"], rows)
        + f"\n\n64-pixel JPEGs of Tiny ImageNet; ours is one process with two threads, {round(one['ours'], -3):,.0f} images/s. Two cores, "
        f"medians of {one['settings']['rounds']} rounds.\n"
        f"Other programs share the two cores, so the last column moves: {len(shorter)} shorter runs gave {min(shorter):.1f} to "
        f"{max(shorter):.1f} × ImageFolder.\n"
        f"Ours reaches {min(bare):.2f} of the bare decoder on the same bytes.\n"
        f"Kept decoded (`--loader.resident`): {resident['1']:.0f} × streaming with one thread, {resident['2']:.0f} × with two.\n"
        f"mosaicml-streaming, in another run: {mosaic['mosaicml-streaming/0']:,.0f} images/s in one process, "
        f"{mosaic['mosaicml-streaming/2']:,.0f} with two workers.\n"
    )  # fmt: skip


def waiting() -> str:
    rows = [
        [str(one["settings"]["ranks"]), one["settings"]["step"]]
        + [f"{100 * one['waiting'][how]:.1f} %" for how in ("stock webdataset", "streaming", "resident")]
        for one in lines("waiting.json")
    ]
    return (
        table(["ranks", "step", "stock webdataset", "ours", "ours, kept decoded"], rows)
        + "\n\nShare of a step's time spent waiting for data. One round, on made-up images, on two cores.\n"
    )


def order() -> str:
    seconds = {
        name: statistics.median(only("order.json", f"order/{name}")["seconds"]) for name in ("start-up", "resume")
    }
    return (
        f"The order of 10⁹ samples in 10⁶ shards starts in {seconds['start-up']:.2f} s, resumes in {seconds['resume']:.2f} s and takes "
        f"{only('order.json', 'order/memory')['megabytes']:.0f} MB, on two cores.\n"
    )


def hostile() -> str:
    found = lines("hostile.json")
    return f"{len(found)} hostile archives: each is refused; the worst takes {max(o['megabytes'] for o in found):.1f} MB of memory.\n"


FIGURES: dict[str, Callable[[], str]] = {
    "loader": loader,
    "waiting": waiting,
    "order": order,
    "hostile": hostile,
}
