"""Data sets in the layout that TFDS and this project read, from what one starts with; needs no TensorFlow.

    python -m pwkd_jax.prepare cifar100 --data-dir data    # downloads 170 MB; or --archive cifar-100-binary.tar.gz
    python -m pwkd_jax.prepare imagenet2012 --data-dir data --train ILSVRC2012_img_train.tar --validation ILSVRC2012_img_val.tar
    python -m pwkd_jax.prepare tfrecord ~/tensorflow_datasets/imagenet2012/5.1.0 --out data

--data-dir, and --out of tfrecord, may be gs://BUCKET/NAME, with --disk=DIR of this machine, where the data set is made before
it is sent. Files are written in parallel. Stopped, the same command goes on where it was; a data set appears under its name
only when it is whole. Sources are only read. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pwkd_jax import storage
from pwkd_jax.data import cifar, imagenet, sending, tfds_writer, tfrecord
from pwkd_jax.errors import UserError, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.prepare", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--disk", help="for a bucket: a folder of this machine, where a data set is made before it is sent")
    common.add_argument("--workers", type=int, default=_cores(), help="processes; as many as there are cores by default")
    made = argparse.ArgumentParser(add_help=False, parents=[common])
    made.add_argument("--data-dir", required=True, help="where data sets lie, each in its folder, or gs://BUCKET/NAME")
    made.add_argument("--no-checksum", action="store_true", help="also take an archive that is not the official one")
    for name, layout in cifar.LAYOUTS.items():
        command = commands.add_parser(name, parents=[made], help=f"from the binary archive of {layout.title}")
        command.add_argument("--archive", type=Path, help=f"{layout.archive}; downloaded to DATA_DIR/downloads by default")
    command = commands.add_parser("imagenet2012", parents=[made], help="from the two tars of ILSVRC2012")
    command.add_argument("--train", type=Path, required=True, help="ILSVRC2012_img_train.tar")
    command.add_argument("--validation", type=Path, required=True, help="ILSVRC2012_img_val.tar")
    command.add_argument("--labels", type=Path, help="of your own validation images: a synset a line, in file-name order")
    command = commands.add_parser("tfrecord", parents=[common], help="from a TFDS directory in TFRecord, TFDS's default")
    command.add_argument("directory", type=Path, help="one version, as ~/tensorflow_datasets/imagenet2012/5.1.0")
    command.add_argument("--out", help="the data directory to write below; by default that of DIRECTORY, with "
                         "-array_record added to its name")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        print(_summary(prepare(options)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def prepare(options: argparse.Namespace) -> Path:
    """Do what was asked and return the data set's folder. Raises UserError."""
    if options.workers < 1:
        raise UserError(f"--workers: {options.workers} is not possible; it should be at least 1")
    if options.what == "tfrecord":
        home, bucket = sending.homes("--out", options.out, options.disk)
        plan = tfrecord.plan(options.directory, home)
        if sending.on_bucket(plan.folder, home, bucket) or _done(plan.folder):
            return sending.sent(plan.folder, home, bucket)
        return sending.sent(tfds_writer.write(plan, options.workers), home, bucket)
    data_dir, bucket = sending.homes("--data-dir", options.data_dir, options.disk)
    version = imagenet.VERSION if options.what == imagenet.NAME else cifar.VERSION
    folder = data_dir / options.what / version
    if sending.on_bucket(folder, data_dir, bucket) or _done(folder):  # asked before the archives are, which may be long gone
        return sending.sent(folder, data_dir, bucket)
    if options.what == imagenet.NAME:
        tars = (options.train.expanduser(), options.validation.expanduser())
        plan = imagenet.plan(data_dir, *tars, options.labels, not options.no_checksum, options.workers)
    else:
        archive = options.archive and options.archive.expanduser()
        plan = cifar.plan(options.what, data_dir, archive, not options.no_checksum)
    return sending.sent(tfds_writer.write(plan, options.workers), data_dir, bucket)


def _done(folder: Path) -> bool:
    done = tfds_writer.already_there(folder)
    if done:
        # Of a run that was killed right after it gave the folder its name.
        shutil.rmtree(tfds_writer.incomplete_folder(folder), ignore_errors=True)
        print(f"{folder}: is there already; remove it to have it prepared again", file=sys.stderr)
    return done


def _summary(folder: Path) -> str:
    """What is there now, and the flags that use it."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    lines = [f"{folder}:"]
    lines += [f"  {s}: {split.num_examples:,} images in {split.num_shards} files" for s, split in sorted(info.splits.items())]
    named = isinstance(info.features, tfds.features.FeaturesDict) and "label" in info.features
    if named and (classes := getattr(info.features["label"], "num_classes", None)):
        lines.append(f"  {classes} classes")
    name = info.name if folder.parent.name == info.name else f"{info.name}/{folder.parent.name}"
    root = storage.above(folder)[len(Path(name).parts)]
    flags = f"--config.data.name={name} --config.data.data_dir={root}"
    if "test" not in info.splits and "validation" in info.splits:
        flags += " --config.data.test_split=validation"
    return "\n".join([*lines, f"use it with {flags}"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(run_command(main))
