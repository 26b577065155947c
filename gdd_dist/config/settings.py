"""Every setting: typed, documented, bounded. Plain data; command_line.py reads it from command line and files."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from gdd_dist.config.steps import STEPS, TABLE

SECTIONS = ("loader", *TABLE)


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    where: bool = False,
) -> Any:
    """A dataclass field with its bounds; ``where``: see ``technical``."""
    bounds = {"low": low, "above": above, "high": high, "below": below}
    meta = {"help": help, **bounds, "choices": choices, "where": where}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: tuple(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


technical = partial(setting, where=True)
"""A setting that changes only where or how fast, so it is in no fingerprint."""
_SEED = "seed of this step only; default: --seed"
PAIR_LOSSES = {
    "skd": "t^2 KL(softmax(s(f(x))/t) || softmax(s(f(g))/t))",
    "kd": "the same without s (Hinton et al. 2015)",
    "dim": "mean over classes of (log_softmax f(x) - log_softmax f(g))^2 (DiM, Wang et al. 2023)",
}
"""The pair losses of matching by name, with their formulas; `training/losses.py` computes them."""
_YEAR = 366 * 86_400.0
"""Seconds. Longer waits make no sense, and overflow the system's clocks."""
CONDENSED = 1_000
"""Most images of a class that are condensed: those of a class are moved together, and need memory together."""
MOST = 10_000
"""Of what a run makes a list: seeds, snapshots, students."""


@dataclass(frozen=True)
class Loader:
    """How images are read and augmented."""

    streams: int = setting(
        0, "sample streams that form a global batch; must divide it; 0: its largest divisor up to 64", low=0
    )
    window: int = setting(16384, "size of the buffer, in samples, within which a stream is shuffled", low=1)
    augment: str = setting(
        "color_crop_cutout",
        "augmentation of teachers, cached views, matching and students: color, crop, cutout joined by _; none: off",
    )
    flip: bool = setting(True, "mirror images at random; never for digits or text")
    threads: int = technical(0, "decoding threads per rank; 0: its share of the cores", low=0)
    prefetch: int = technical(2, "batches read ahead, if they fit in 256 MiB", low=1, high=64)
    resident: str = technical(
        "auto",
        "where decoded images are kept: none: nowhere; ram: in a file in STORE/cache, shared by all ranks of a host; device: on the GPU; "
        "auto: the fastest of these in which they take at most a quarter of the free memory",
        choices=("auto", "none", "ram", "device"),
    )

    cache_dir: str = technical("", "directory for downloaded shards; default ~/.cache/gdd_dist/data")
    cache_limit: str = technical("50GB", "largest total size of downloaded shards, such as 50GB")
    patience: float = technical(
        300.0, "seconds for which the server of a remote --data may fail before the run ends", low=0, high=_YEAR
    )


@dataclass(frozen=True)
class Teachers:
    """The pool of teachers: classifiers trained on real images, then frozen."""

    seed: int | None = setting(None, _SEED, low=0)
    architectures: tuple[str, ...] = setting(
        ("convnet", "resnet10"),
        "classifiers of the pool; NAME or NAME:WIDTH of convnet resnet10 resnet18 resnet10_ap resnet18_ap resnet10_bn resnet18_bn vgg11 alexnet",
    )
    seeds: int = setting(4, "trainings per architecture, each with its own seed", low=1, high=MOST)
    snapshots: int = setting(
        3, "snapshots kept from each training, including early ones; each is a teacher", low=1, high=MOST
    )
    epochs: int = setting(30, "epochs of each training", low=1)
    batch: int = setting(128, "images per step", low=1)
    lr: float = setting(0.05, "peak learning rate of SGD (linear warm-up over 5 %, then cosine to 0)", above=0)
    momentum: float = setting(0.9, "momentum of SGD (Nesterov)", low=0, high=1)
    weight_decay: float = setting(5e-4, "weight decay", low=0)
    ranks_per_teacher: int = technical(
        1, "ranks that train one teacher together with DDP; must divide the number of ranks", low=1
    )
    accumulate: int = technical(
        1, "micro-batches per rank into which a teacher's batch is split, to save memory", low=1
    )
    activation_checkpointing: bool = technical(
        False,
        "store only the input of each block of a teacher, and recompute the rest in the backward pass: less memory, a third more time",
    )
    pretrained: str | None = technical(
        None, "directory of classifiers (safetensors files that name their architecture) to use instead of training"
    )


@dataclass(frozen=True)
class Logits:
    """The cache of teacher logits."""

    seed: int | None = setting(None, _SEED, low=0)
    views: int = setting(
        4,
        "views of each training image whose logits are cached; view 0 is the plain image, others are augmented",
        low=1,
        high=1024,
    )
    batch: int = technical(256, "images per forward pass", low=1)


@dataclass(frozen=True)
class Gaussian:
    """The trivial generator: a Gaussian per class in principal components. Every other generator must beat it."""

    seed: int | None = setting(None, _SEED, low=0)
    components: tuple[int, ...] = setting(
        (256,),
        "numbers of principal components to try on val; limited to 256, the pixel values, and images minus classes",
        low=1,
    )
    spread: tuple[float, ...] = setting((0.7, 1.0), "factors of each class's standard deviation to try on val", above=0)
    dtype: str = setting(
        "float16", "number format of the file; float16 halves its size", choices=("float16", "float32")
    )


@dataclass(frozen=True)
class Gan:
    """The conditional GAN that matching starts from."""

    seed: int | None = setting(None, _SEED, low=0)
    start: str = setting(
        "noise",
        "images of the untrained generator: noise, or images drawn by the step gaussian, to which it adds a residual",
        choices=("noise", "gaussian"),
    )
    steps: int = setting(2000, "generator steps", low=1)
    batch: int = setting(64, "images of a global batch", low=1)
    latent: int = setting(64, "dimension of the latent; with --gan.start gaussian, of the residual's own noise", low=1)
    width: int = setting(64, "channels of the generator's widest stage", low=4)
    blocks: int = setting(2, "residual blocks per stage", low=1, high=256)
    patch: int = setting(1, "side of the pixel patches on which both networks compute; 2 costs a quarter", low=1)
    d_width: int = setting(64, "channels of the discriminator's widest stage", low=4)
    d_blocks: int = setting(2, "residual blocks per stage of the discriminator", low=1, high=256)
    lr: float = setting(2e-4, "learning rate of both networks at the start (Adam)", above=0)
    lr_final: float = setting(5e-5, "learning rate at the end (cosine)", low=0)
    beta1: float = setting(0.0, "Adam's first beta", low=0, below=1)
    beta2: float = setting(0.99, "Adam's second beta", low=0, below=1)
    gamma: float = setting(1.0, "weight of the zero-centred gradient penalties at the start", low=0)
    gamma_final: float = setting(0.1, "weight of the gradient penalties at the end (log-linear)", low=0)
    augment: str = setting(
        "crop",
        "augmentation of real and generated images before the discriminator: color, crop, cutout joined by _; none: off",
    )
    augment_p: float = setting(0.5, "share of images that are augmented before the discriminator", low=0, high=1)
    ema_images: float = setting(10_000.0, "half-life of the generator's EMA, in images (shorter at the start)", above=0)
    grid_interval: int = technical(500, "steps between sample grids in TensorBoard", low=1)


@dataclass(frozen=True)
class Matching:
    """Training the generator until the teachers' logits on its images match those on real images."""

    seed: int | None = setting(None, _SEED, low=0)
    start: str = setting(
        "gan",
        "generator to move: the GAN, or the Gaussian of each class, whose means and covariances are then trained",
        choices=("gan", "gaussian"),
    )
    steps: int = setting(600, "generator steps", low=1)
    batch: int = setting(64, "images of a global batch", low=1)
    group: int = setting(
        8, "images per group; a group has one class and one teacher, and is never split over ranks", low=1
    )
    loss: str = setting(
        "skd",
        "pair loss, a mean over pairs of a real image x and a generated one g of its class (f: a teacher's logits; s: standardized "
        "over classes; t: temperature); " + "; ".join(f"{name}: {formula}" for name, formula in PAIR_LOSSES.items()),
        choices=tuple(PAIR_LOSSES),
    )
    temperature: float = setting(2.0, "softmax temperature of skd and kd", above=0)
    lambda_pair: float = setting(1.0, "weight of the pair loss", low=0)
    lambda_mean: float = setting(0.1, "weight of the class-mean loss", low=0)
    lambda_label: float = setting(0.0, "weight of the cross-entropy between the teachers' answers and the class", low=0)
    lambda_feature: float = setting(
        0.0,
        "weight of the class-mean loss on the inputs of a teacher's last layer, as a share of their variance within classes",
        low=0,
    )
    lambda_adv: float = setting(
        0.1, "weight of the adversarial loss; the discriminator keeps training unless it is 0", low=0
    )
    lr: float = setting(1e-4, "learning rate of the generator (Adam, cosine to a tenth)", above=0)
    lr_d: float = setting(1e-4, "learning rate of the discriminator", above=0)
    gamma: float = setting(0.1, "weight of the gradient penalties", low=0)
    ema_images: float = setting(5_000.0, "half-life of the generator's EMA, in images", above=0)
    views: int = setting(0, "number of cached views to use, beginning with view 0; 0: all", low=0)
    teachers: str = setting(
        "all", "teachers to use: every snapshot (all), or only the last one of each training", choices=("all", "last")
    )
    select: str = setting(
        "best", "generator to keep: the best on val of all intervals and the GAN, or the last", choices=("best", "last")
    )
    interval: int = setting(200, "steps between measurements with quick students", low=1)
    quick_students: int = setting(4, "quick students per measurement", low=1, high=MOST)
    quick_student: str = setting("convnet:64", "classifier of the quick students")
    quick_steps: int = setting(200, "optimizer steps of a quick student", low=1)
    quick_batch: int = setting(64, "newly drawn images per step of a quick student, balanced over classes", low=1)


@dataclass(frozen=True)
class Report:
    """Students trained only on generated images, and the baselines they are compared with."""

    seed: int | None = setting(None, _SEED, low=0)
    ipc: tuple[int, ...] = setting((1,), "images per class; one or several numbers", low=1)
    seeds: int = setting(3, "students per row, each with its own seed", low=1, high=MOST)
    students: tuple[str, ...] = setting(("convnet",), "architectures of the students; NAME or NAME:WIDTH")
    protocol: tuple[str, ...] = setting(
        ("regenerate", "fixed"),
        "regenerate: new images each epoch; fixed: the same images in all epochs",
        choices=("regenerate", "fixed"),
    )
    labels: tuple[str, ...] = setting(
        ("hard", "soft"), "hard: the class; soft: mean of the teachers' softmax", choices=("hard", "soft")
    )
    baselines: tuple[str, ...] = setting(
        ("real", "equal_bytes", "gaussian", "gan", "full"),
        "baselines: as many real images (real), a fixed set of real images that takes as many bytes as the generator's file (equal_bytes), the "
        "trivial generator (gaussian), the generator before matching (gan), all real data (full)",
        choices=("real", "equal_bytes", "gaussian", "gan", "full"),
    )
    select: tuple[int, ...] = setting(
        (1,),
        "draws from which the teachers choose each image that a student sees; one or several numbers: 1: no choice; 1 3: each row once "
        "without a choice, and once with a choice from three",
        low=1,
        high=64,
    )
    condense: int = setting(
        0,
        "steps in which the teachers move the latents of a fixed set of generated images, so that it teaches more; 0: none; above 0: each "
        "fixed row of a generator once without this, and once with it",
        low=0,
    )
    epochs: int = setting(1000, "epochs of a student; an epoch has IPC images per class", low=1)
    batch: int = setting(256, "most images per step; a step uses min(batch, IPC x classes)", low=1)
    lr: float = setting(0.01, "constant learning rate of SGD", above=0)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = setting(5e-4, "weight decay", low=0)
    label_temperature: float = setting(1.0, "temperature of soft labels", above=0)
    full_epochs: int = setting(30, "epochs of the full-data students", low=1)
    full_lr: float = setting(0.01, "learning rate of the full-data students (constant)", above=0)
    ars: bool = setting(
        True, "also train students of the fixed rows of real and matched without augmentation, for DD-Ranking's ARS"
    )


@dataclass(frozen=True)
class Config:
    """The whole run."""

    data: str | None = technical(
        None,
        "data set directory made by `python -m sharding build`, or its URL (s3://, gs://, https://); without it the digits are built in OUT/data",
    )
    out: str | None = technical(None, "run directory; default runs/PRESET")
    store: str | None = technical(None, "where finished steps are kept, so that runs share them; default OUT")
    until: str = technical("report", "last step to run", choices=STEPS)
    engine: str = technical(
        "ddp",
        "how ranks train generator and discriminator together: torch's DDP, or DeepSpeed (ZeRO 0 to 3)",
        choices=("ddp", "deepspeed"),
    )
    deepspeed_config: str | None = technical(
        None, "JSON file for --engine deepspeed: zero_optimization, offload, communication; default: ZeRO stage 1"
    )
    accumulate: int = technical(
        1, "micro-batches per rank into which a gan or matching batch is split, to save memory", low=1
    )
    device: str = technical("auto", "auto: CUDA if available, else CPU", choices=("auto", "cpu", "cuda"))
    compile: bool = technical(
        False,
        "compile classifiers and generator with torch.compile, and on a GPU replay students' steps as CUDA graphs: the first steps take minutes, "
        "later ones less time",
    )
    channels_last: bool | None = technical(
        None, "use the channels-last memory format for generator and discriminator (--engine ddp); default: on a GPU"
    )
    deterministic: bool = technical(
        False,
        "use deterministic GPU kernels, so that an interrupted run ends with the same bits as an uninterrupted one; slower. Otherwise the "
        "fastest convolutions are searched. CPUs are always deterministic",
    )
    timeout: float = technical(
        600.0,
        "seconds without a heartbeat after which a rank counts as lost; a busy rank still sends heartbeats",
        above=0,
        high=_YEAR,
    )
    checkpoint_seconds: float = technical(
        10.0,
        "least seconds between checkpoints; longer if saving would take more than 3 % of the time; 0: every step",
        low=0,
        high=_YEAR,
    )
    checkpoints_kept: int = technical(3, "number of newest checkpoints kept per training loop", low=1)
    verify: bool = technical(True, "check the sha256 of every input file before the first step")
    debug: bool = technical(False, "show tracebacks")
    seed: int = setting(0, "seed of every step", low=0)
    precision: str = setting(
        "auto",
        "number format of computation; weights stay float32: float32; tf32, which rounds factors on a GPU, but not on a CPU; bf16 or "
        "fp16, by autocast; auto: bf16 if the hardware supports it, else float32",
        choices=("auto", "float32", "tf32", "bf16", "fp16"),
    )
    loader: Loader = dataclasses.field(default_factory=Loader)
    teachers: Teachers = dataclasses.field(default_factory=Teachers)
    logits: Logits = dataclasses.field(default_factory=Logits)
    gaussian: Gaussian = dataclasses.field(default_factory=Gaussian)
    gan: Gan = dataclasses.field(default_factory=Gan)
    matching: Matching = dataclasses.field(default_factory=Matching)
    report: Report = dataclasses.field(default_factory=Report)

    def step_seed(self, step: str) -> int:
        """Return SECTION.seed if it is given, else ``seed``."""
        own = getattr(self, step).seed
        return self.seed if own is None else int(own)

    def streams(self, step: str) -> int:
        """Return the number of streams of a global batch of gan or of a teacher's batch (which one team trains):
        ``loader.streams`` reduced to a number that divides it."""
        from gdd_dist.data.order import default_streams  # imported here, because it loads numpy

        asked, batch = self.loader.streams, int(getattr(self, step).batch)
        if not asked:
            return default_streams(batch)
        return math.gcd(asked, batch) if step == "teachers" else asked

    def shaping(self, section: str) -> dict[str, Any]:
        """Return the settings of one section that change results, for a fingerprint (without its seed)."""
        values = getattr(self, section)
        return {
            f.name: getattr(values, f.name)
            for f in dataclasses.fields(values)
            if not f.metadata["where"] and f.name != "seed"
        }
