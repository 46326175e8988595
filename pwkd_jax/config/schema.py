"""The schema: every key of a config with its default and its meaning. configs/*.py start from `default()`."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from pwkd_jax import distillers


def optimizer() -> ConfigDict:
    return ConfigDict({
        "name": "sgd",  # sgd, adamw, lamb, lars, lion; or module:function, as optax:adamw or optax.contrib:muon
        "momentum": 0.9,  # adamw, lamb, lion: beta1
        "nesterov": False,
        "weight_decay": 5e-4,
        "decay": "all",  # all, or kernels: arrays of two or more axes, so neither batch norm nor biases
        "clip_norm": 0.0,  # of the global gradient; 0 is off
        "layer_decay": 1.0,  # of the learning rate, from each layer to the one before it, as in 0.75; 1 is off
    })  # fmt: skip


def _schedule(peak: float) -> ConfigDict:
    return ConfigDict({
        "form": "cosine",  # cosine, step, triangular, one_cycle or constant
        "peak": peak,  # the highest learning rate
        "per_batch": 0,  # of batches of so many images; the peak grows with the batch in proportion; 0: any
        "floor": 0.0,  # cosine and triangular: the lowest, as a fraction of the peak
        "milestones": (0.625, 0.75, 0.875),  # step: fractions of the cycle; 150, 180 and 210 of 240 epochs
        "factor": 0.1,  # step: multiplies at each milestone
        "warmup": "0 epochs",  # linear, the first part of every cycle; cosine, step and constant only
    })  # fmt: skip


def _mixing() -> ConfigDict:
    return ConfigDict({
        "mixup": 0.0,  # alpha of Beta(alpha, alpha), by which images and labels of a batch are mixed; 0: off
        "cutmix": 0.0,  # the same of boxes of one image in another
        "chance": 1.0,  # of a batch being mixed
        "switch": 0.5,  # of CutMix, where both are on
        "smoothing": 0.0,  # of labels: of each, so much is spread over all classes
        "balance": 0.0,  # 1: every class has the same part of the cross entropy, however rare; 0: every image; or between
        "class_weights": (),  # the same by numbers of your own, one for each class
    })  # fmt: skip


def default() -> ConfigDict:
    """A new ConfigDict with every key. Locked: a key that is not here cannot be set."""
    config = ConfigDict()
    config.name = "experiment"  # shown in the report
    config.seed = 0  # the teacher's; students use seed, seed + 1, ...
    config.seeds = 3  # students per arm; 0 trains the arms' teachers alone
    config.arms = ("alone", "kd_whole", "kd_whole_cyclic", "pwkd")  # see stages.ARMS
    config.dtype = "float32"  # of convolutions and products; bfloat16 leaves parameters, statistics and losses float32
    config.batch_norm_group = 0  # batch norm over groups of so many images; 0: over the global batch
    config.mesh = ConfigDict({"model": 1})  # so many devices share one copy of a network; 1: pure data parallelism
    config.non_finite = "stop"  # at a step whose loss or gradient is not finite; or skip: it changes nothing and is counted
    config.steps_per_dispatch = 0  # of one compiled loop, at most, over images on the devices; 0: 1 on CPU, otherwise 100

    config.data = ConfigDict({
        "name": "digits",  # scikit-learn's digits, any TFDS image classification set, or folder: SPLIT/CLASS/IMAGE
        "data_dir": "",  # where TFDS sets lie, or the folder; '' is TFDS's own default, ~/tensorflow_datasets
        "copy": "",  # of a data_dir on gs://: the folder of each machine into which what is needed of it is copied once
        "train_split": "train",  # TFDS slicing, train[:5000]; or stratified(train, 80%), so much of each class
        "test_split": "test",  # of that, what is left: stratified(train, 80%:); another draw: stratified(train, 80%:, seed=1)
        "validation_split": "",  # to choose by: a student's best weights, an early end; as stratified(train, 90%:) beside 90%
        "num_classes": 0,  # 0: as the data set says; otherwise it must agree
        "crop_padding": 0,  # random crop after zero padding by so many pixels
        "pixel_range": (),  # folder: black and white of samples that are no bytes, as (0,4095); (): as a 16-bit type says
        "flip": False,  # random horizontal flip
        "policy": "",  # then rand (RandAugment), trivial (TrivialAugment, wide), or auto_cifar10 or auto_imagenet (AutoAugment)
        "policy_layers": 2,  # rand: operations an image
        "policy_magnitude": 9,  # rand: of 30
        "jitter": (),  # strengths of brightness, contrast, saturation and hue, as in (0.3,0.3,0.3,0.1)
        "blur": 0.0,  # chance of Gaussian blur
        "erasing": 0.0,  # chance of a box of the mean colour
        # Per channel, of pixels in [0, 1], so numbers in units of 0..255 are divided by 255; (): those of the weights that are
        # given, or else measured.
        "mean": (),
        "std": (),
        "on_device": "auto",  # the training images, whole on every device: auto (up to 1 GiB), always or never
        "image_size": 0,  # 0: images of one size, decoded once into RAM; above: streamed, cropped to so many pixels
        "scale": (0.08, 1.0),  # streamed: area of the random crops of training, as parts of the image's
        "resize": 0,  # streamed: shorter side of test images before their central crop; 0: 8/7 of image_size, 256 for 224
        "workers": -1,  # streamed: processes that decode; -1: one a core, 0: none but this
        "unreadable": 0.0,  # streamed: share of the training images that may be skipped
    })  # fmt: skip

    # Table A of the algorithm: the decomposable teacher.
    config.teacher = ConfigDict({
        "model": "resnet20",  # see models.create; or module:Name
        "weights": "",  # a .safetensors of convert or export: where training starts; kd_standard's teacher as it is
        "head": "keep",  # of those weights; new: a classifier begun anew, for other classes; kd_standard's is then trained too
        "freeze": (),  # parts of an ordinary teacher that stay as the weights have them, as stem_*,stage1_*; or trunk
        "run": "",  # the workdir of another experiment whose finished teachers teach here too, instead of ones trained anew
        "order": "bn_scale",  # of its channels, the most important first, by bn_scale or l1; or none
        "widths": (0.25, 0.5, 0.75, 1.0),  # the sub-networks
        "image_size": 0,  # it sees the images resized to so many pixels each way; 0: as the student does
        "mean": (),  # and normalised by these, of pixels in [0, 1]; (): as the student does
        "std": (),
        "divisor": 0,  # channels: 0 exact, otherwise rounded to multiples
        "zero_gamma": False,  # last batch-norm scale of each block starts at 0
        "drop_path": 0.0,  # stochastic depth: chance of the last residual block being left out, of those before it less
        "dropout": 0.0,  # before the classifier
        "execution": "take",  # take: sliced; mask: full shapes with zeros. Equal results
        "sampling": "all",  # all widths every step; sandwich: widest, narrowest and drawn ones
        "subnetworks": 4,  # sandwich: how many a step
        "pool": (),  # sandwich: further widths that may be drawn
        "loss": "hard",  # of all but the widest: hard labels, inplace or inplace_mix
        "reduction": "sum",  # of the sub-networks' losses: sum or mean
        "batch_norm": "switchable",  # switchable, private_stats or shared
        "duration": "240 epochs",
        "batch_size": 64,
        "accumulate": 1,  # parts of a batch that are learnt from in turn, for one optimiser step; batch norm sees a part
        "ema": 0.0,  # decay of a mean of weights and statistics over the steps, which is frozen in their place; 0: off
        "sharding": "replicated",  # of parameters and optimiser state; fsdp: large arrays split over the devices
    })  # fmt: skip
    config.teacher.mix = _mixing()
    config.teacher.calibration = ConfigDict({
        "images": 0,  # measure batch-norm statistics anew on so many training images; 0: keep the running ones
        "batch_size": 256,
        "seed": 0,
    })  # fmt: skip
    config.teacher.optimizer = optimizer()
    config.teacher.schedule = _schedule(0.05)

    # Table B: the student and its stages.
    config.student = ConfigDict({
        "model": "resnet8",
        "weights": "",  # a .safetensors to start from
        "head": "keep",  # as the teacher's
        "freeze": (),  # parts that stay as the weights have them, as stem_*,stage1_*; or trunk: all but the classifier
        "width": 1.0,
        "drop_path": 0.0,  # as the teacher's
        "dropout": 0.0,
        "teachers": (),  # workdirs whose finished teachers teach beside this one's: at each width the mean of all logits
        "teacher_shares": (),  # of that mean, this experiment's own first; (): equal
        "widths": (),  # the stages' teacher widths in order; (): the teacher's, narrow to wide
        "duration": "240 epochs",  # of all stages together (see budget); the controls get the same
        "budget": "total",  # total: the stages share the duration; per_stage: each has all of it
        "stage_shares": (),  # relative lengths, e.g. (30, 30, 60, 120); (): equal
        "reset": (),  # at stage starts: momentum, batch_norm, weights; the rest carries over
        "connectors": "leading",  # a distiller's parameters at a new width: leading block, or reinit
        "temperatures": (),  # the distiller's, one for each of those widths; (): its own temperature for all
        "standardise_logits": False,  # the distiller sees z-scores of both networks' logits
        "same_crop": True,  # the teacher sees the student's augmented images
        "ensemble": 2,  # stage-end snapshots in the extra row of the results
        "batch_size": 64,
        "accumulate": 1,  # as the teacher's; methods that compare a batch's images see a part too
        "ema": 0.0,  # as the teacher's; it is scored, saved and predicts in the weights' place
        "batches": "own",  # every seed its own order and augmentation; shared: those of the first seed, so that all can train
        "mutual": 0.0,  # weight of what an arm's students, with shared batches, learn from each other; 0: nothing
        "mutual_temperature": 1.0,  # of both sides of that
        "online": "",  # fusion: the last of an arm's students is led by the fused maps of the others, see training/fusion.py
        "together": "auto",  # with shared batches, in one program: auto, unroll, scan, vmap, devices (one each) or none
        "study": False,  # with shared batches, all arms in one program, for which each sub-network of a teacher predicts once
        "sharding": "replicated",  # as the teacher's
        "teacher_sharding": "replicated",  # of the frozen sub-network that teaches
        "teacher_dtype": "",  # in which it predicts: float32 or bfloat16; '': dtype
        "teacher_folded": False,  # its batch norm folded into its convolutions
    })  # fmt: skip
    config.student.mix = _mixing()  # seen by student and teacher alike, unless same_crop is false
    config.student.fusion = ConfigDict({
        "temperature": 2.0,  # of all divergences
        "diversity": 1e-5,  # weight of what a student hears of the maps of the one before it
        "fused": 10.0,  # weight of the maps that the leader hears
        "self_distillation": 1000.0,  # weight of the loss of the modules that lead from a last map to those before it
        "warmup": 5,  # epochs over which these three weights rise
    })  # fmt: skip
    config.student.distiller = ConfigDict({"name": "kd", **distillers.fields("kd")})
    config.student.optimizer = optimizer()
    config.student.optimizer.dot = 0.0  # sgd: by so much more momentum for what the teacher says, less for labels (DOT); 0: off
    config.student.schedule = _schedule(0.05)
    config.student.schedule.cycles = "per_stage"  # of kd_whole_cyclic and the pwkd arms; or single
    config.student.schedule.peak_decay = 1.0  # each cycle's peak is the last one's times this
    config.student.schedule.single_form = ""  # form of the controls' one cycle; '': the same form

    config.evaluation = ConfigDict({
        "every": "1 epoch",
        "batch_size": 512,
        "patience": 0,  # evaluations without a better one on the validation split that end a student's last stage; 0: never
    })  # fmt: skip
    config.checkpoint = ConfigDict({"every": "10 %"})  # of the teacher's or the student's run; stage ends always
    config.log = ConfigDict({
        "every": "50 steps",
        "tensorboard": True,
        "tracker": "",  # wandb or mlflow, where they are installed; or module:Class, see training/trackers.py
    })  # fmt: skip
    config.profile = ""  # part of a run's name and steps, as in pwkd/seed0:100-110: a trace of them in RUN/profile
    return config.lock()


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
