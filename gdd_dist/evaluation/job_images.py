"""How many images the networks forward for one student, from its job alone. Pure functions."""

from __future__ import annotations

from gdd_dist.evaluation.kinds import GENERATORS
from gdd_dist.evaluation.rows import Job
from gdd_dist.training.condense import START
from gdd_dist.training.teacher_features import REAL
from sharding.manifest import Manifest


def images_labelled(job: Job) -> int:
    """Return the images that teachers label: all images of a student with soft labels, or its set once if epochs are equal."""
    if job.row.labels != "soft":
        return 0
    same = job.row.protocol == "fixed" and not job.row.augmented
    return job.budget.distinct_images_seen if same else job.budget.images_seen


def images_chosen(job: Job) -> int:
    """Return the number of draws among which the teachers choose."""
    shown = job.budget.images_seen if job.row.protocol == "regenerate" else job.budget.images_seen // job.budget.epochs
    of = START if job.row.condense else job.row.select
    return shown * of if of > 1 else 0


def images_condensed(job: Job, manifest: Manifest) -> int:
    """Return the images that one teacher, the next in each step, forwards to move a set's latents."""
    return (job.row.ipc or 0) * len(manifest.classes) * job.row.condense


def images_compared(job: Job, manifest: Manifest) -> int:
    """Return the real images whose features a set is compared with when its latents are moved."""
    return sum(min(n, REAL) for n in manifest.splits["train"].class_counts) if job.row.condense else 0


def images_answered(job: Job) -> int:
    """Return the number of images that each last teacher forwards for a job, to label them and to choose among them."""
    return images_labelled(job) + images_chosen(job)


def images_drawn(job: Job) -> int:
    """Return the number of images that the generator draws for a job."""
    if job.row.train_on not in GENERATORS:
        return 0
    times = START + job.row.condense + 1 if job.row.condense else job.row.select
    return job.budget.distinct_images_seen * times


def images_forwarded(job: Job, last_teachers: int, manifest: Manifest) -> int:
    """Return the images forwarded by a job: by student, teachers (choice, condensation, soft labels) and generator, and test."""
    of_all = (images_answered(job) + images_compared(job, manifest)) * last_teachers
    test = manifest.splits["test"].samples
    return job.budget.images_seen + of_all + images_condensed(job, manifest) + images_drawn(job) + test
