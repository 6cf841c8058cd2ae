"""The pipeline's steps without notebooks: `python -m gad teacher pixart`, `accelerate launch -m gad distill …`."""

import argparse
import sys

from .params import ParamsError, Run, assignment, load, out_of_memory, read
from .schema import SEEDS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("gad", description=__doc__)
    parser.add_argument("--params", default=None, help="another params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. gad.h=0.02; repeatable")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, args in (
        ("autoencoder", "train an autoencoder of the world", ("kind",)),
        ("teacher", "train a miniature teacher", ("backbone",)),
        ("diagnose", "teacher endpoints, tangents and floors", ("backbone",)),
        ("distill", "train a student", ("backbone", "paradigm", "variant", "seed")),
        ("publish", "a student from a checkpoint of others", ("backbone", "paradigm")),
        ("evaluate", "measure a student", ("backbone", "paradigm", "variant", "seed")),
        ("nearby", "the teacher at noises nearby, and its tangents on the way", ("backbone",)),
        ("chain", "where a student's cosine is lost", ("backbone", "paradigm", "variant", "seed")),
        ("judge", "train the world's OpenCLIP model", ()),
        ("references", "the teacher's side of Tables 2, 3, 5, 6 and Figure 5", ("backbone",)),
        ("use", "the student's side of them", ("backbone", "paradigm", "variant", "seed")),
        ("trial", "train and measure a student at the --set given; a row of reports/tuning.csv",
         ("backbone", "paradigm", "variant", "seed")),
        ("weigh", "the gradients of a paradigm's own loss and of every term beside it, by which to choose λ",
         ("backbone", "paradigm")),
        ("benchmark", "count full-size steps, time them on a GPU, plan their training; reports/benchmark.json", ()),
        ("cost", "time a step of every paradigm without and with GAD; reports/cost.md", ("backbone", "blocks")),
    ):
        command = commands.add_parser(name, help=text)
        for arg in args:
            number = {"seed": 0, "blocks": 8}.get(arg)
            command.add_argument(arg, **({} if number is None else {"nargs": "?", "default": number, "type": int}))
        if name == "benchmark":
            command.add_argument("backbone", nargs="*", default=["sd2", "pixart", "sana"])
            command.add_argument("--paradigms", nargs="+", default=["ladd", "tdm", "sid"])
            for option, kind in (("blocks", int), ("batch", int), ("gpus", int), ("precision", str)):
                command.add_argument(f"--{option}", type=kind, default={"blocks": 8, "gpus": 8}.get(option))
            command.add_argument("--compile", action="store_true", default=None, help="as hardware.compile")
            command.add_argument("--miniature", action="store_true", help="time the small networks, on any machine")
            command.add_argument("--tflops", type=float, nargs=2, default=[300.0, 40.0], metavar=("BF16", "FP32"),
                                 help="what a GPU sustains, for hours where there is none to be timed")
        if name == "cost":
            command.add_argument("--paradigms", nargs="+", help="these alone; the rows of others stay")
        if name == "distill":
            command.add_argument("--track", choices=("tensorboard", "wandb", "dvclive"), help="losses, probes, samples")
    args = parser.parse_args(argv)
    import json

    try:
        overrides = dict(_assignment(item) for item in args.set)
        p = load(**({"path": args.params} if args.params else {}), **overrides)
        trained = dict.fromkeys(("distill", "trial", "weigh"), p.paradigms)
        trained["publish"] = [e.paradigm for e in p.published.values()]
        known = {
            "kind": p.autoencoder, "backbone": p.backbones, "variant": p.variants,
            "paradigm": trained.get(args.command, p.names),
        }
        if args.command == "benchmark":
            from . import stages

            stages.benchmark(
                p, tuple(args.backbone), tuple(args.paradigms), args.blocks, args.batch, args.precision, args.compile,
                miniature=args.miniature, gpus=args.gpus, tflops=tuple(args.tflops),
            )
            return 0
        for name, choices in known.items():
            if getattr(args, name, None) not in (None, *choices):
                there = ", ".join(choices) or "none in params.yaml's published section"
                raise ParamsError(f"{name}={getattr(args, name)!r} is unknown: there are {there}")
        if getattr(args, "seed", 0) not in SEEDS:
            raise ParamsError(f"seed={args.seed} is no seed: give 0 to {SEEDS[-1]}")
        if "paradigm" in args:
            key = (Run(args.backbone, args.paradigm, getattr(args, "variant", "base"), getattr(args, "seed", 0)),)
            if args.command in ("distill", "trial"):
                p.check_forms(key)
        else:
            key = tuple(getattr(args, name) for name in ("kind", "backbone") if name in args)
        from . import stages  # after the checks: it imports torch

        further = {
            "trial": lambda: (overrides,), "cost": lambda: (args.blocks, args.paradigms),
            "distill": lambda: (args.track,),
        }.get(args.command, tuple)()
        if told := getattr(stages, args.command)(*key, p, *further):  # nothing of a process beside the main one
            print(json.dumps(told, indent=2))
    except (ValueError, OSError, RuntimeError) as error:
        short = type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported
        print(f"gad: {out_of_memory(str(error)) if short else error}", file=sys.stderr)
        return 1
    return 0


def _assignment(text: str) -> tuple:
    import yaml

    key, value = assignment(text)
    try:
        return key, read(value)
    except yaml.YAMLError:
        raise ParamsError(f"--set {text}: {value!r} is not YAML: put it into quotes") from None


if __name__ == "__main__":
    sys.exit(main())
