"""params.yaml as validated objects. A mistake is one line that names the key, the value and the fix."""

import ast
import math
import re
from pathlib import Path

import yaml
from pydantic import ValidationError, model_validator

from .schema import PLAIN, TERM, Block, Distill, Gad, Run, Sections, Teacher

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = ("base", "gad")  # that are always there
NEED_A_FAKE = ("score", "paired-score", "released")  # forms of GAD; the others learn from the teacher's paths
TOGETHER = {"unrelated": 2, "rkd": 3, "similarity": 2}  # forms of GAD that are of samples together: the fewest of them


def out_of_memory(text: str) -> str:
    """What torch says where memory runs out, in a line with the fix."""
    first = text.partition(". ")[0]
    return (f"{first}; what takes less: hardware.parts, checkpointing or shard where a student is trained, "
            "hardware.tangents, evaluation.batch")


def _wrong(key: str, value: float) -> str | None:
    """What is wrong with a paradigm's setting, by its name."""
    if not math.isfinite(value):
        return "must be a finite number"
    if (key == "lr" or key.endswith("_lr")) and value <= 0:
        return "must be greater than 0"
    if key in ("steps", "ratio", "solver", "rank") and (value < 1 or not value.is_integer()):
        return "must be a whole number, 1 or more"
    if key == "beta1" and not 0 <= value < 1:
        return "must be at least 0 and less than 1"
    return None


def _said(name: str, attribute: str):
    """A paradigm's `settings` or `form`, as its file has it: importing it would import torch. None where it is no plain
    value."""
    try:
        nodes = ast.walk(ast.parse((ROOT / f"gad/paradigms/{name}.py").read_text("utf-8")))
        found = (n.value for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == attribute)
        return ast.literal_eval(next(found))
    except (StopIteration, SyntaxError, ValueError):
        return None


def _fakeless(name: str) -> bool:
    """Whether a paradigm's file says that it has no fake score: neither of its own nor of another's."""
    text = (ROOT / f"gad/paradigms/{name}.py").read_text("utf-8")
    return _said(name, "form") is None and bool(re.search(r"^class \w+\((Paradigm|Adversarial)\)", text, re.M))


class Params(Sections):
    """params.yaml, whole and consistent."""

    @model_validator(mode="after")
    def _known(self):
        # By file names: importing the registries would cost every command the import of torch.
        backbones = {f.stem for f in (ROOT / "gad/backbones").glob("*.py")} - {"__init__", "base", "tokens"}
        paradigms = {f.stem for f in (ROOT / "gad/paradigms").glob("*.py")} - {"__init__", "base", "forms"}
        checks = []
        for key, block in self.blocks.items():
            if not block.runs(self.seeds.distill):
                continue
            variants = self.controls if block in self.further.controlled else VARIANTS
            checks += [
                # teachers are made for the grid's backbones
                (f"{key}.backbones", block.backbones, self.backbones if key == "grid" else self.grid.backbones,
                 "the backbones section" if key == "grid" else "grid.backbones"),
                (f"{key}.paradigms", block.paradigms, self.paradigms, "the paradigms section"),
                (f"{key}.variants", block.variants, variants, "the controls section or base and gad"),
            ]
        for key, names, known, where in (
            *checks,
            ("distill.fp32", self.distill.fp32, self.backbones, "the backbones section"),
            ("paradigms", self.paradigms, sorted(paradigms), "gad/paradigms"),
            (
                "backbones.*.family",
                [b.family or name for name, b in self.backbones.items()],
                sorted(backbones),
                "gad/backbones",
            ),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{key}: {name!r} is not in {where}; there are {', '.join(known)}")
        for key, entry in self.published.items():
            if entry.backbone not in self.grid.backbones:
                there = ", ".join(self.grid.backbones)
                raise ValueError(f"published.{key}.backbone={entry.backbone!r} is not in grid.backbones ({there})")
            if key != (name := f"{entry.backbone}-{entry.paradigm}-base-0"):
                raise ValueError(f"published.{key}: its key must be its students' name: write {name}")
        if self.hardware.shard and self.distill.optimiser == "adamw8bit":
            raise ValueError("hardware.shard=True: 8-bit moments cannot be shared out: set distill.optimiser to adamw")
        self._check_names()
        self._check_terms()
        self._check_paradigms()
        runs = self.runs() + self.replicas
        if twice := [run for i, run in enumerate(runs) if run in runs[:i]]:
            raise ValueError(f"further: {twice[0]} is a student twice: take it out of one of its blocks")
        for name, which in self.backbones.items():
            if which.world == "coco" and which.path is None:
                raise ValueError(f"backbones.{name}.path is missing: world 'coco' needs a pipeline folder or hub id")
            if which.world == "coco":
                for kinds in (("openclip",), ("pickscore",), ("dinov2",), ("rt-detr", "grounding-dino")):
                    if not set(kinds) & set(self.coco.judges):
                        there = [*self.coco.judges]
                        raise ValueError(f"coco.judges={there}: backbones.{name} needs {' or '.join(kinds)} too")
            try:
                self.teacher_of(name)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(("backbones", name, "pretrain", *map(str, first["loc"])))
                raise ValueError(f"{where}={_told(first)}") from None
        return self

    def _check_names(self):
        """Of what students are named by, and their files."""
        for name in self.controls:
            if not re.fullmatch(r"\w+", name) or name in VARIANTS:
                raise ValueError(f"controls: {name!r} is no name for one: use letters, digits and _, not base or gad")
        for name in (*self.backbones, *self.published):
            if not re.fullmatch(r"\w[\w.-]*", name):
                told = "use letters, digits, _, . and -, the last two not first"
                raise ValueError(f"{name!r} is no name for a backbone or a student: {told}")

    def _check_terms(self):
        terms = {"gad": self.gad} | {f"controls.{name}": control for name, control in self.controls.items()}
        for key, term in terms.items():
            if not term.lam:
                continue
            if term.scheme == "exact" and self.hardware.shard:
                fix = f"set it to false, or {key}.scheme to forward"
                raise ValueError(f"hardware.shard=True: exact JVPs need whole networks: {fix}")
            if term.pairs < (least := TOGETHER.get(term.form, 1)):
                fix = f"make it {least} or more"
                raise ValueError(f"{key}.pairs={term.pairs}: `{term.form}` is of several samples: {fix}")

    def check_forms(self, runs):
        """ParamsError where one of `runs`, which are to be trained, has a form of GAD that its paradigm cannot have."""
        for run in runs:
            term, key = self.term(run.variant), "gad" if run.variant == "gad" else f"controls.{run.variant}"
            if term and term.form in NEED_A_FAKE and run.paradigm in self.paradigms and _fakeless(run.paradigm):
                fix = f"use 'map' or 'step', or leave {run.paradigm} out"
                raise ParamsError(f"{key}.form={term.form!r} needs a fake score, which {run.paradigm} has not: {fix}")

    def _check_paradigms(self):
        for name, settings in self.paradigms.items():
            known = _said(name, "settings")
            known = known if isinstance(known, tuple) else ()
            for key in ("lr", *known):
                if key not in settings:
                    raise ValueError(f"paradigms.{name}.{key} is missing: add it")
            for key, value in settings.items():
                if known and key not in (*known, "steps"):
                    there = ", ".join(known)
                    raise ValueError(f"paradigms.{name}.{key}={value:g} is not a key of this paradigm: it has {there}")
                if wrong := _wrong(key, value):
                    raise ValueError(f"paradigms.{name}.{key}={value:g} {wrong}")
            for variant, control in self.controls.items():
                if self.steps(name, variant) < 1:
                    raise ValueError(f"controls.{variant}.longer={control.longer:g} leaves {name} no step: raise it")

    def teacher_of(self, backbone: str) -> Teacher:
        """The `teacher` section with the backbone's own `pretrain` values over it."""
        return Teacher.model_validate(self.teacher.model_dump() | self.backbones[backbone].pretrain)

    def runs(self) -> list["Run"]:
        """Every student but replicas, the grid's first, in the pipeline's order. Results are collected by this list
        alone; of replicas, for a table of their own, by `replicas`."""
        blocks = [block for block in self.blocks.values() if block is not self.further.replicas]
        trained = [run for block in blocks for run in block.runs(self.seeds.distill)]
        return trained + [Run(entry.backbone, entry.paradigm, "base", 0) for entry in self.published.values()]

    @property
    def replicas(self) -> list["Run"]:
        """The students that are trained again."""
        return self.further.replicas.runs(self.seeds.distill)

    @property
    def blocks(self) -> dict[str, Block]:
        """The grid and what is beside it, by key."""
        return {"grid": self.grid} | {f"further.{name}": block for name, block in self.further}

    def training(self, backbone: str) -> Distill:
        """The distill section as a backbone's students are trained by it."""
        own = {"precision": "no"} if backbone in self.distill.fp32 else {}
        return self.distill.model_copy(update={"fp32": [], **own})

    def term(self, variant: str) -> Gad | None:
        """What `variant` adds to the paradigm's loss: None for nothing."""
        if variant == "base":
            return None
        term = self.gad if variant == "gad" else self.controls[variant]
        return term if term.lam else None

    def steps(self, paradigm: str, variant: str) -> int:
        """Training steps of a student: the paradigm's own `steps`, else `distill.steps`."""
        control = self.controls.get(variant)
        steps = self.paradigms[paradigm].get("steps", self.distill.steps)
        return round(steps * (control.longer if control else 1))

    def student_steps(self, run: "Run") -> int:
        """Sampling steps of a student: a published checkpoint may have its own."""
        entry = self.published.get(str(run))
        return (entry and entry.steps) or self.backbones[run.backbone].student_steps

    def settings(self, paradigm: str, variant: str) -> dict:
        """The paradigm's, as `variant` is trained by them."""
        control, own = self.controls.get(variant), self.paradigms[paradigm]
        return own | {"lr": own["lr"] * (control.rate if control else 1)}

    def base_of(self, variant: str) -> str:
        """The variant that is trained as `variant` is but for its term: what it is compared with."""
        own = self.controls.get(variant)
        return next((
            name for name, other in self.controls.items()
            if own and own.lam and not other.lam and (own.longer, own.rate) == (other.longer, other.rate)
        ), "base")

    @property
    def names(self) -> list[str]:
        """What may stand for a paradigm in a student's name."""
        return [*self.paradigms, *(entry.paradigm for entry in self.published.values())]

    @property
    def variants(self) -> list[str]:
        return [*VARIANTS, *self.controls]


class ParamsError(ValueError):
    """A mistake in params.yaml."""


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """`1e-05`, a string in YAML 1.1, is a number: DVC's `-S` writes it so. A key stands once."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"line {line}" if lines[key.value] == line else f"lines {lines[key.value]} and {line}"
                raise ParamsError(f"{key.value!r} is there twice, in {where}: keep one of them")
            lines[key.value] = line
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read(text: str):
    """What YAML says."""
    return yaml.load(text, _Loader)


def load(path: Path | str = ROOT / "params.yaml", **overrides) -> Params:
    """Read and validate. `overrides`: dotted keys, `load(**{"gad.h": 0.02})`.

    Raises ParamsError with one line a mistake: key, value, fix.
    """
    try:
        data = read(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist: run from the repository, or give --params") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}; give a file as --params") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except ParamsError as error:
        raise ParamsError(f"{Path(path).name}: {error}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        section = data
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or (leaf not in section and not parents):
            raise ParamsError(f"{key}={value!r}: there is no such key in {Path(path).name}")
        section[leaf] = float(value) if isinstance(value, str) and EXPONENT.match(value) else value
    return validate(data, Path(path).name)


def validate(data: dict, where: str = "params.yaml") -> Params:
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(k for k in map(str, e["loc"]) if k not in (TERM, PLAIN)) or "params"
            value = e["input"]
            if e["type"] == "value_error":
                text = str(e["ctx"]["error"])
                name = "" if key == "params" else f"{key}: " if isinstance(value, dict) else f"{key}={value!r} "
                lines.append(f"{where}: {name}{text}")
            elif e["type"] == "extra_forbidden":
                lines.append(f"{where}: {key}={value!r} is not a key of this section: remove or rename it")
            elif e["type"] == "missing":
                lines.append(f"{where}: {key} is missing: add it")
            else:
                lines.append(f"{where}: {key}={_told(e)}")
        raise ParamsError("\n".join(lines)) from None


def assignment(text: str) -> tuple[str, str]:
    """Key and value of a `--set KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ParamsError(f"--set {text}: write KEY=VALUE")
    return key, value


def _told(error) -> str:
    """The value, what is wrong with it and, of a wrong type, how to write it."""
    value, fix = error["input"], ""
    if error["type"] == "bool_type":
        fix = " (write true or false)"
    elif isinstance(value, str) and _number(value):
        fix = " (write 1.0e-4, with the dot)" if "e" in value.lower() else f" (write {value}, without quotes)"
    elif error["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        fix = f" (write {value:.0f})"
    return f"{value!r}: {error['msg'][0].lower()}{error['msg'][1:]}{fix}"


def _number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
