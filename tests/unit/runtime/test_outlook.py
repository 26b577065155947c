"""How long a whole run still takes, guessed from its images."""

import pytest

from gdd_dist.runtime.monitor import Outlook


class Run:
    """A run that is at ``now`` seconds and has forwarded ``done`` images in this step."""

    def __init__(self) -> None:
        self.now, self.done = 100.0, 0
        self.outlook = Outlook({"teachers": 1000, "gan": 3000}, lambda: self.done, lambda: self.now)

    def work(self, seconds: float, images: int) -> None:
        self.now += seconds
        self.done += images


def test_all_that_is_left_goes_at_the_speed_so_far() -> None:
    run = Run()
    run.outlook.begin("teachers")
    run.work(20, 500)
    assert run.outlook.seconds() == pytest.approx(3500 / 25)
    assert run.outlook() == "whole run: about 2 min left"
    run.work(20, 500)
    run.outlook.end("teachers")
    run.now += 7  # between two steps nothing is computed
    run.done = 0
    run.outlook.begin("gan")
    assert run.outlook.seconds() == pytest.approx(3000 / 25)
    run.work(40, 3000)
    assert run.outlook.seconds() == 0


def test_nothing_is_guessed_from_nothing() -> None:
    run = Run()
    assert run.outlook() == ""
    run.outlook.begin("teachers")
    run.work(9, 500)
    assert run.outlook() == ""
    run.work(1, 0)
    assert run.outlook() != ""


def test_a_finished_step_slows_nothing() -> None:
    run = Run()
    run.outlook.begin("teachers")
    run.now += 500  # its files came from another host
    run.outlook.end("teachers")
    run.outlook.begin("gan")
    run.work(30, 1500)
    assert run.outlook.seconds() == pytest.approx(30)


def test_a_step_that_took_more_images_than_expected_has_none_left() -> None:
    run = Run()
    run.outlook.begin("teachers")
    run.work(20, 4000)
    assert run.outlook.seconds() == pytest.approx(3000 / 200)


def test_the_run_takes_no_less_than_the_loop_at_work() -> None:
    run = Run()
    run.outlook.begin("teachers")
    run.work(20, 500)
    assert run.outlook.seconds(loop=90) == pytest.approx(90 + 3000 / 25)


def test_a_step_without_a_count_adds_nothing_but_its_speed() -> None:
    run = Run()
    run.outlook.begin("another")
    run.work(20, 500)
    assert run.outlook.seconds() == pytest.approx(4000 / 25)
    run.outlook.end("another")
    run.done = 0
    run.outlook.begin("teachers")
    assert run.outlook.seconds() == pytest.approx(4000 / 25)
