"""What is refused in a config before anything is read or compiled."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from pwkd_jax import data, distillers, models, slimmable, stages
from pwkd_jax.config import schema
from pwkd_jax.config.schema import leaves
from pwkd_jax.data import policies
from pwkd_jax.errors import UserError
from pwkd_jax.models import precision
from pwkd_jax.training import optimizers, profile, schedules, students_together, trackers

# Far above what anybody means, and finite as a float32.
MOST = 1e30


# Lists that hold names; all others hold numbers.
NAMES = ("arms", "student.reset", "student.teachers", "teacher.freeze",
         "student.freeze")


def check_kinds(config: ConfigDict) -> None:
    """Raise a UserError for the first number that nobody means, and for a list that holds what it should not."""
    for key, value in leaves(config):
        right = ""
        if isinstance(value, tuple) and key in NAMES and not all(isinstance(v, str) for v in value):
            right = "a list of names, as in pwkd,alone"
        elif isinstance(value, tuple) and key not in NAMES and not key.startswith("student.distiller."):
            if not all(type(v) in (int, float) and abs(v) <= MOST for v in value):
                right = "a list of numbers, as in (0.5,1.0)"
        elif type(value) is int and abs(value) >= 2**31:
            right = "a whole number below 2^31"
        elif type(value) is float and not abs(value) <= MOST:
            right = "a number within 1e30"
        if right:
            raise UserError(f"{key}: {value!r} is not possible; it should be {right}")


def check(config: ConfigDict) -> None:
    """Raise a UserError for the first value that cannot be, or contradicts another; compiles and reads nothing."""
    c, t, s = config, config.teacher, config.student

    def need(key: str, ok: bool, right: str) -> None:
        if not ok:
            value = dict(leaves(config))[key]
            raise UserError(f"{key}: {value!r} is not possible; it should be {right}")

    def one_of(key: str, values: Sequence[str]) -> None:
        need(key, dict(leaves(config))[key] in values, "one of " + ", ".join(v or "''" for v in values))

    check_kinds(config)
    need("seeds", c.seeds >= 0, "0 (teachers alone) or more")
    need("seed", 0 <= c.seed < 2**31, "between 0 and 2^31 - 1")
    need("arms", bool(c.arms) and len(set(c.arms)) == len(c.arms), "a list of different arms")
    for arm in c.arms:
        need("arms", arm in stages.ARMS, "from " + ", ".join(stages.ARMS))
    one_of("dtype", precision.DTYPES)
    one_of("non_finite", ("stop", "skip"))
    trackers.check(c.log.tracker)
    if c.profile:
        profile.parse(c.profile)
    need("batch_norm_group", c.batch_norm_group >= 0, "0 (the global batch) or a number of images")
    need("mesh.model", c.mesh.model >= 1, "1 (pure data parallelism) or the number of devices that share a network")
    for key in ("teacher.sharding", "student.sharding", "student.teacher_sharding"):
        one_of(key, ("replicated", "fsdp"))
    need("steps_per_dispatch", c.steps_per_dispatch >= 0, "0 (chosen for you) or the most steps of one dispatch")
    one_of("data.on_device", ("auto", "always", "never"))
    need("data.on_device", c.data.on_device != "always" or not c.data.image_size,
         "auto or never where images are streamed, which is where data.image_size is above 0")  # fmt: skip
    need("steps_per_dispatch", c.steps_per_dispatch <= 1 or not (c.data.on_device == "never" or c.data.image_size),
         "0 or 1 where images are streamed or data.on_device is 'never'")  # fmt: skip
    need("data.num_classes", c.data.num_classes >= 0, "0 (as the data set says) or its number of classes")
    need("data.crop_padding", c.data.crop_padding >= 0, "0 or more pixels")
    one_of("data.policy", policies.POLICIES)
    need("data.policy_layers", c.data.policy_layers >= 1, "at least 1")
    need("data.policy_magnitude", 0 <= c.data.policy_magnitude < policies.BINS, f"from 0 to {policies.BINS - 1}")
    need("data.jitter", len(c.data.jitter) in (0, 4) and all(0 <= s <= 1 for s in c.data.jitter)
         and max((*c.data.jitter, 0, 0, 0, 0)[3], 0) <= 0.5,
         "() or the strengths of brightness, contrast, saturation and hue, from 0 to 1, that of hue to 0.5")  # fmt: skip
    need("data.blur", 0 <= c.data.blur <= 1, "a chance from 0 to 1")
    need("data.erasing", 0 <= c.data.erasing <= 1, "a chance from 0 to 1")
    need("data.pixel_range", not c.data.pixel_range or c.data.name == "folder", "() unless data.name is 'folder'")
    need("data.pixel_range", len(set(c.data.pixel_range)) == len(c.data.pixel_range) in (0, 2),
         "() or the values of black and of white, as in (0,4095)")  # fmt: skip
    need("data.std", len(c.data.std) == len(c.data.mean), "one number for each channel, given together with data.mean")
    data.check_normalisation(c.data.mean, c.data.std, "data.mean", "data.std")

    d = c.data
    need("data.image_size", d.image_size >= 0, "0 (of one size, in RAM) or the pixels each way of streamed images")
    need("data.scale", len(d.scale) == 2 and 0 < d.scale[0] <= d.scale[1] <= 1,
         "the smallest and the largest part of the area, as in (0.08,1.0)")  # fmt: skip
    need("data.resize", not d.resize or d.resize >= d.image_size,
         f"0 (8/7 of it) or at least data.image_size, which is {d.image_size}")  # fmt: skip
    need("data.workers", d.workers >= -1, "-1 (one a core), 0 (none but this process) or a number of processes")
    need("data.unreadable", 0 <= d.unreadable < 1, "in [0, 1)")
    if d.image_size:
        need("data.crop_padding", not d.crop_padding, "0 where data.image_size streams random crops of its own")
        need("data.mean", bool(d.mean or t.weights or s.weights),
             "given, with data.std, where data.image_size streams images, which cannot be measured first, as in "
             "(0.485,0.456,0.406)")  # fmt: skip
        need("student.same_crop", s.same_crop, "true where data.image_size streams images, which come cropped to both")

    for key, widths in (("teacher.widths", t.widths), ("teacher.pool", t.pool)):
        need(key, all(0 < w <= 1 for w in widths), "different widths in (0, 1]")
        # As they are written: 0.5 and 0.5000001 would have one name, and one file.
        need(key, len({f"{w:g}" for w in (*widths, *t.widths)}) == len({*widths, *t.widths}) and len({*widths}) == len(widths),
             "different widths in (0, 1], which differ in six digits")  # fmt: skip
    need("teacher.widths", bool(t.widths), "at least one width")
    slimmable_teaches = any(arm not in ("alone", "kd_standard") for arm in c.arms)
    need("teacher.freeze", not (t.freeze and slimmable_teaches),
         "() where an arm is taught by the slimmable teacher, whose narrow widths are still to be trained")  # fmt: skip
    need("teacher.image_size", t.image_size >= 0, "0 (as the student's) or the pixels each way that it sees")
    need("teacher.std", len(t.std) == len(t.mean), "one number for each channel, given together with teacher.mean")
    data.check_normalisation(t.mean, t.std, "teacher.mean", "teacher.std")
    one_of("teacher.order", ("bn_scale", "l1", "none"))
    one_of("teacher.execution", ("take", "mask"))
    one_of("teacher.sampling", ("all", "sandwich"))
    one_of("teacher.loss", ("hard", "inplace", "inplace_mix"))
    one_of("teacher.reduction", ("sum", "mean"))
    one_of("teacher.batch_norm", slimmable.BATCH_NORMS)
    need("teacher.divisor", t.divisor >= 0, "0 (exact) or the number that channels should be multiples of")
    need("teacher.subnetworks", t.subnetworks >= 2, "at least 2: the widest and the narrowest")
    need("teacher.loss", len(t.widths) > 1 or t.loss == "hard", "'hard' where teacher.widths has a single width")
    need("teacher.sampling", len(t.widths) > 1 or t.sampling == "all", "'all' where teacher.widths has a single width")
    need("teacher.pool", not t.pool or t.sampling == "sandwich", "() unless teacher.sampling is 'sandwich'")
    need("teacher.pool", not t.pool or t.batch_norm != "switchable",
         "() where teacher.batch_norm is 'switchable', which has no state for widths outside teacher.widths")  # fmt: skip
    need("teacher.pool", all(min(t.widths) < w < max(t.widths) for w in t.pool), "between the ends of teacher.widths")
    need("teacher.calibration.images", t.calibration.images >= 0, "0 (off) or a number of images")
    need("teacher.calibration.batch_size", t.calibration.batch_size >= 1, "at least 1")
    need("teacher.calibration.batch_size", not (c.batch_norm_group and t.calibration.images)
         or t.calibration.batch_size % c.batch_norm_group == 0,
         f"a multiple of batch_norm_group, which is {c.batch_norm_group}")  # fmt: skip
    need("teacher.calibration.seed", t.calibration.seed >= 0, "0 or more")

    one_of("student.budget", ("total", "per_stage"))
    one_of("student.connectors", ("leading", "reinit"))
    one_of("student.batches", ("own", "shared"))
    one_of("student.teacher_dtype", ("", *precision.DTYPES))
    one_of("student.together", students_together.HOW)
    need("student.together", s.together in ("auto", "none") or s.batches == "shared",
         "auto or none where student.batches is 'own', for students in one program share their batches")  # fmt: skip
    need("student.together", s.together != "devices" or (s.sharding == s.teacher_sharding == "replicated" and
         c.mesh.model == 1), "another where networks are split over devices")  # fmt: skip
    need("student.together", s.together in ("auto", "none") or c.non_finite == "stop",
         "auto or none where non_finite is 'skip', for what one student skips the others need not")  # fmt: skip
    need("student.study", not s.study or (s.batches == "shared" and s.together not in ("devices", "none")),
         "false unless student.batches is 'shared', and student.together neither 'devices' nor 'none'")  # fmt: skip
    need("student.study", not s.study or (s.accumulate == 1 and c.non_finite == "stop" and not c.evaluation.patience),
         "false where student.accumulate, non_finite or evaluation.patience let each student go its own way")  # fmt: skip
    o = s.optimizer
    need("student.optimizer.dot", o.dot == 0 or (o.dot > 0 and o.momentum - o.dot >= 0 and o.momentum + o.dot < 1),
         f"0 (off), or so little that momentum - dot and momentum + dot are in [0, 1); momentum is {o.momentum}")  # fmt: skip
    need("student.optimizer.dot", not o.dot or (o.name == "sgd" and not o.nesterov and not o.clip_norm and o.layer_decay == 1),
         "0 unless optimizer.name is sgd, without nesterov, clip_norm and layer_decay")  # fmt: skip
    need("student.optimizer.dot", not o.dot or s.accumulate == 1, "0 where student.accumulate is above 1")
    need("student.mutual", s.mutual >= 0, "0 (off) or a weight")
    need("student.mutual", not s.mutual or c.seeds != 1, "0 with one seed: its student has nobody to learn from")
    need("student.mutual", not s.mutual or (s.batches == "shared" and s.together != "none"),
         "0 unless student.batches is 'shared', and student.together not 'none': they learn in one program")  # fmt: skip
    need("student.mutual", not s.mutual or (s.accumulate == 1 and c.non_finite == "stop" and not c.evaluation.patience),
         "0 where student.accumulate, non_finite or evaluation.patience let each student go its own way")  # fmt: skip
    need("student.mutual_temperature", s.mutual_temperature > 0, "above 0")
    one_of("student.online", ("", "fusion"))
    need("student.online", not s.online or c.seeds not in (1, 2),
         "'' with fewer than three seeds: the leader has at least two to follow")  # fmt: skip
    need("student.online", not s.online or not s.mutual, "'' where student.mutual is above 0, which is a part of it")
    need("student.online", not s.online or (s.batches == "shared" and s.together != "none"),
         "'' unless student.batches is 'shared', and student.together not 'none': they learn in one program")  # fmt: skip
    need("student.online", not s.online or (s.accumulate == 1 and c.non_finite == "stop" and not c.evaluation.patience),
         "'' where student.accumulate, non_finite or evaluation.patience let each student go its own way")  # fmt: skip
    need("student.fusion.temperature", s.fusion.temperature > 0, "above 0")
    for key in ("diversity", "fused", "self_distillation", "warmup"):
        need(f"student.fusion.{key}", s.fusion[key] >= 0, "0 or more")
    one_of("student.schedule.cycles", ("per_stage", "single"))
    one_of("student.schedule.single_form", ("", *schedules.CYCLES))
    need("student.reset", set(s.reset) <= {"momentum", "batch_norm", "weights"}, "from momentum, batch_norm, weights")
    need("student.widths", set(s.widths) <= set(t.widths), f"from teacher.widths, which are {t.widths}")
    count = len(s.widths or t.widths)
    need("student.stage_shares", not s.stage_shares or (len(s.stage_shares) == count and min(s.stage_shares) > 0),
         f"() or {count} numbers above 0, one for each stage")  # fmt: skip
    need("student.temperatures", not s.temperatures or (len(s.temperatures) == count and min(s.temperatures) > 0),
         f"() or {count} numbers above 0, one for each width that teaches")  # fmt: skip
    given = {*zip(s.widths, s.temperatures, strict=False)}
    need("student.temperatures", len(given) == len({w for w, _ in given}), "the same for a width that teaches twice")
    need("student.teachers", len({*s.teachers}) == len(s.teachers) and all(s.teachers), "() or different workdirs")
    need("student.teacher_shares", not s.teacher_shares or
         (len(s.teacher_shares) == 1 + len(s.teachers) and min(s.teacher_shares) > 0),
         "() or numbers above 0, one for this teacher and one for each of student.teachers")  # fmt: skip
    need("student.width", 0 < s.width <= 1, "in (0, 1]")
    need("student.ensemble", s.ensemble >= 1, "at least 1")
    need("student.schedule.peak_decay", s.schedule.peak_decay > 0, "above 0")

    for who in ("teacher", "student"):
        g = config[who]
        o, r = g.optimizer, g.schedule
        need(f"{who}.optimizer.name", o.name in optimizers.NAMES or ":" in o.name,
             "one of " + ", ".join(optimizers.NAMES) + ", or module:function of an optax optimiser")  # fmt: skip
        one_of(f"{who}.head", ("keep", "new"))
        need(f"{who}.freeze", not g.freeze or g.weights, f"() unless {who}.weights are given")
        need(f"{who}.head", g.head == "keep" or g.weights, f"keep unless {who}.weights are given")
        one_of(f"{who}.optimizer.decay", ("all", "kernels"))
        need(f"{who}.optimizer.momentum", 0 <= o.momentum < 1, "in [0, 1)")
        need(f"{who}.optimizer.nesterov", not o.nesterov or o.momentum > 0, "false where momentum is 0")
        need(f"{who}.optimizer.weight_decay", o.weight_decay >= 0, "0 or more")
        need(f"{who}.optimizer.clip_norm", o.clip_norm >= 0, "0 (off) or the largest norm")
        try:
            plain = {key: value for key, value in o.items() if key != "layer_decay"}
            optimizers.optimizer(**plain)
            misplaced = optimizers.refused(o.name, plain, schema.optimizer())
        except UserError as e:
            raise UserError(f"{who}.optimizer.name: {e}") from e
        need(f"{who}.optimizer.{misplaced}", not misplaced, f"left as it is with {o.name}, which has no place for it")
        need(f"{who}.optimizer.layer_decay", 0 < o.layer_decay <= 1, "above 0 and at most 1, which is off")
        need(f"{who}.optimizer.layer_decay", o.layer_decay == 1 or ":" not in o.name,
             "1 with module:function, whose steps come with their learning rate in them")  # fmt: skip
        need(f"{who}.batch_size", g.batch_size >= 1, "at least 1")
        need(f"{who}.accumulate", g.accumulate >= 1 and g.batch_size % g.accumulate == 0,
             f"a number of equal parts of {who}.batch_size, which is {g.batch_size}")  # fmt: skip
        for rate in models.RATES:
            need(f"{who}.{rate}", 0 <= g[rate] < 1, "a chance from 0 to below 1")
        need(f"{who}.ema", 0 <= g.ema < 1, "0 (off) or a decay below 1, as in 0.9999")
        need(f"{who}.schedule.per_batch", r.per_batch >= 0, "0 (any) or a number of images")
        for name, most in (("mixup", 100), ("cutmix", 100), ("chance", 1), ("switch", 1), ("smoothing", 0.999),
                           ("balance", 1)):
            need(f"{who}.mix.{name}", 0 <= g.mix[name] <= most, f"from 0 to {most}")
        need(f"{who}.mix.class_weights", not g.mix.class_weights or
             (min(g.mix.class_weights) > 0 and not g.mix.balance),
             "() or a number above 0 for each class, and () where mix.balance is above 0")  # fmt: skip
        one_of(f"{who}.schedule.form", schedules.CYCLES)
        need(f"{who}.schedule.peak", r.peak > 0, "above 0")
        need(f"{who}.schedule.floor", 0 <= r.floor <= 1, "in [0, 1]")
        need(f"{who}.schedule.factor", r.factor > 0, "above 0")
        need(f"{who}.schedule.milestones", all(0 < m < 1 for m in r.milestones) and list(r.milestones) ==
             sorted(set(r.milestones)), "rising fractions of the cycle between 0 and 1")  # fmt: skip
        need(f"{who}.batch_size", not c.batch_norm_group or g.batch_size % (c.batch_norm_group * g.accumulate) == 0,
             f"a multiple of batch_norm_group, which is {c.batch_norm_group}" +
             f", times {who}.accumulate" * (g.accumulate > 1))  # fmt: skip
        schedules.steps(g.duration, f"{who}.duration", batch_size=g.batch_size, images=1)
        warmup = schedules.steps(
            r.warmup, f"{who}.schedule.warmup", batch_size=g.batch_size, images=1, total=1, zero=True
        )  # fmt: skip
        rising = sorted(_forms(who, r) & {*schedules.RISING})
        need(f"{who}.schedule.warmup", not (warmup and rising),
             f"'0 epochs' where a cycle's form is {' or '.join(rising)}, which rises by itself")  # fmt: skip
    need("evaluation.batch_size", c.evaluation.batch_size >= 1, "at least 1")
    need("evaluation.patience", c.evaluation.patience >= 0, "0 (never) or a number of evaluations")
    need("evaluation.patience", not c.evaluation.patience or bool(c.data.validation_split),
         "0 without a data.validation_split to judge by")  # fmt: skip
    for key in ("evaluation", "checkpoint", "log"):
        schedules.steps(config[key].every, f"{key}.every", batch_size=s.batch_size, images=1, total=100)

    for key, name in (("teacher.model", t.model), ("student.model", s.model)):
        try:
            models.create(name)
        except models.WidthError:
            pass
        except UserError as e:
            raise UserError(f"{key}: {e}") from e
    options = {k: v for k, v in s.distiller.items() if k != "name"}
    try:
        method = distillers.create(s.distiller.name, **options)
    except UserError as e:
        raise UserError(f"student.distiller: {e}") from e
    need("student.optimizer.dot", not s.optimizer.dot or not getattr(method, "initial_epochs", 0),
         f"0 with {s.distiller.name}, whose initial phase has neither a labels' nor a teacher's part")  # fmt: skip


def _forms(who: str, schedule: ConfigDict) -> set[str]:
    """The forms that cycles of `who` may have."""
    if who == "teacher":
        return {schedule.form}
    return {schedule.single_form or schedule.form} | ({schedule.form} if schedule.cycles == "per_stage" else set())
