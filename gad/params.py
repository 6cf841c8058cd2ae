"""params.yaml as validated objects. A mistake is one line that names the key, the value and the fix."""

import ast
import math
import re
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

ROOT = Path(__file__).resolve().parent.parent

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Average = Annotated[float, Field(gt=0, lt=1)]  # what is saved is the average
Divisor = Annotated[
    PositiveInt,
    AfterValidator(lambda n: n if 1000 % n == 0 else _fail("must divide 1000, the length of the DDPM schedules")),
]
EvenDivisor = Annotated[  # floors are measured at half of them
    Divisor, AfterValidator(lambda n: n if n % 2 == 0 else _fail("must be even: floors are measured at half of it"))
]
Precision = Annotated[  # a bare `no` is false in YAML 1.1, and a string to DVC, whose `-S` writes it so
    Literal["no", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)
]
Power = Annotated[float, Field(ge=0, le=8), BeforeValidator(lambda v: float(v) if isinstance(v, bool) else v)]

TOGETHER = {"unrelated": 2, "rkd": 3, "similarity": 2}  # forms of GAD that are of samples together: the fewest of them


def _fail(message):
    raise ValueError(message)


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


def _settings(name: str) -> tuple[str, ...]:
    """A paradigm's keys, as its file has them: importing it would import torch. () where they are no plain tuple."""
    try:
        nodes = ast.walk(ast.parse((ROOT / f"gad/paradigms/{name}.py").read_text("utf-8")))
        found = (n.value for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "settings")
        return tuple(map(ast.literal_eval, next(found).elts))
    except (AttributeError, StopIteration, SyntaxError, ValueError):
        return ()


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)  # true is no 1.0, "no" no false


class Seeds(_Section):
    world: int
    distill: Annotated[list[int], Field(min_length=1)]

    @property
    def told(self) -> str:
        """Those of distillation, in words."""
        one = len(self.distill) == 1
        return f"one distillation seed ({self.distill[0]})" if one else f"distillation seeds {str(self.distill)[1:-1]}"


class Gad(_Section):
    form: Literal[
        "map", "step", "score", "paired-score", "released", "rkd", "similarity", "augmentation", "unrelated"
    ]
    h: Positive
    lam: NonNegative
    scheme: Literal["forward", "central", "exact"]
    directions: PositiveInt
    every: PositiveInt
    pairs: PositiveInt
    normalise: bool
    robust: bool


class Base(_Section):
    lam: Annotated[float, Field(ge=0, le=0)]


class _Varied(_Section):
    """`longer`: training steps of a further variant, and `rate`: its student's learning rate, in units of the
    others'."""

    longer: Positive = 1.0
    rate: Positive = 1.0


class Plain(_Varied, Base):
    """A further variant without a term."""


class Control(_Varied, Gad):
    """What a further variant does in GAD's place."""


TERM, PLAIN = "(term)", "(plain)"  # tags of the two, which no message shows


def _kind(control) -> str:
    """The tag of its model, by what it says."""
    said = control.__dict__ if isinstance(control, BaseModel) else control
    return TERM if isinstance(said, dict) and (said.get("form") or said.get("lam")) else PLAIN


class Block(_Section):
    """Students: one of each backbones × paradigms × variants."""

    backbones: list[str]
    paradigms: list[str]
    variants: list[str]

    def runs(self, seeds: list[int]) -> list["Run"]:
        parts = product(self.backbones, self.paradigms, self.variants, seeds)
        return [Run(*part) for part in parts]


class Grid(Block):
    backbones: Annotated[list[str], Field(min_length=1)]
    paradigms: Annotated[list[str], Field(min_length=1)]
    variants: Annotated[list[Literal["base", "gad"]], Field(min_length=1)]


class Replicas(Block):
    """Students of other blocks trained again, from seeds of their own."""

    seeds: list[int]

    def runs(self, seeds: list[int]) -> list["Run"]:
        return super().runs(self.seeds)


class Further(_Section):
    """Blocks beside the grid, each with stages of its own in dvc.yaml."""

    baselines: Block
    controls: Block
    maps: Block
    rates: Block
    lengths: Block
    baseline_maps: Block
    replicas: Replicas

    @property
    def controlled(self) -> list["Block"]:
        """The blocks whose variants are `controls`."""
        return [self.controls, self.maps, self.rates, self.lengths, self.baseline_maps]


class BackboneParams(_Section):
    """One backbone. `path`: a pipeline folder or hub id; None for the miniature the pipeline trains."""

    world: Literal["mini", "coco"]
    autoencoder: Literal["kl", "dc"] = "kl"
    family: str | None = None
    path: str | None = None
    revision: str | None = None
    variant: str | None = None  # of the weight files, as "fp16"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of text encoder and autoencoder
    teacher_steps: EvenDivisor
    student_steps: Divisor
    cfg: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    pretrain: dict[str, Any] = {}  # checked over `teacher`


class Published(_Section):
    """A few-step checkpoint of others, as a row of every table. `path`: a pipeline folder or hub id of the backbone's
    kind; or `lora`: a LoRA on the backbone's own network, a folder, safetensors file or hub id (`file` in it)."""

    backbone: str
    paradigm: str  # the name its rows have
    path: str | None = None
    lora: str | None = None
    file: str | None = None
    revision: str | None = None
    steps: PositiveInt | None = None  # it is sampled in; null: the backbone's student_steps

    @model_validator(mode="after")
    def _one(self):
        if (self.path is None) == (self.lora is None):
            raise ValueError("needs either path or lora: give one of them")
        return self


class Expert(_Section):
    """A judge of photographs: a folder or hub id, and its revision."""

    path: str
    revision: str | None = None


class Coco(_Section):
    """The world of photographs. `archives`: the annotations to fetch, none where no backbone is of this world.
    `prompts`: a file of training prompts in place of COCO's own captions, and the `column` that holds them."""

    archives: list[Literal["val2014"]] = []
    test: PositiveInt = 10_000
    unseen: PositiveInt = 200
    layouts: PositiveInt = 800
    prompts: str | None = None
    column: str | None = None
    judges: dict[Literal["openclip", "pickscore", "dinov2", "rt-detr", "grounding-dino"], Expert] = {}


class AutoencoderParams(_Section):
    steps: PositiveInt
    batch: PositiveInt
    lr: Positive
    compile: bool


class Cycle(_Section):
    """One cosine cycle of a teacher's training. `focus`: share of the noise levels drawn where layouts are decided,
    their log SNR normal about `focus_at`; `crowded`: scenes are drawn in proportion to that power of their number of
    objects (true: 1); `text`: the text encoder's rates as a multiple of the network's; `seed`: added to the world's, so
    that cycles need not draw the same noises."""

    steps: PositiveInt
    lr: Positive
    muon: Positive
    compile: bool
    precision: Precision
    focus: Annotated[float, Field(ge=0, le=1)] = 0.0
    focus_at: Annotated[float, Field(ge=-8, le=4)] = -3.0
    crowded: Power = 0.0
    text: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0


class Teacher(Cycle):
    batch: PositiveInt
    warmup: PositiveInt
    ema: Average
    drop: Fraction
    scenes: PositiveInt
    prompts: PositiveInt
    refine: list[Cycle]  # each sets out from the average of the one before

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data):
        """What a later cycle does not say is the first's."""
        if isinstance(data, dict) and isinstance(data.get("refine"), list):
            first = {k: data[k] for k in Cycle.model_fields if k in data}
            cycles = [first | c if isinstance(c, dict) else c for c in data["refine"]]
            data = data | {"refine": cycles}
        return data


class Endpoints(_Section):
    pairs: PositiveInt
    probes: PositiveInt
    samples: PositiveInt


class Distill(_Section):
    batch: PositiveInt
    prompts: PositiveInt
    steps: PositiveInt
    warmup: PositiveInt
    ema: Average
    clip: Positive
    save_every: PositiveInt
    precision: Precision
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"

    @property
    def identity(self) -> dict:
        """What fixes a student. Defaults are left out: a new key with one makes no student another."""
        return self.model_dump(exclude_defaults=True)


class Hardware(_Section):
    """How a student's training fits a machine. Results are the same but for rounding: no stage depends on it."""

    parts: PositiveInt = 1
    checkpointing: bool = False
    shard: bool = False
    tangents: PositiveInt = 32

    def accumulate(self, processes: int) -> int:
        """Parts that each of so many processes takes, one after another."""
        return -(-self.parts // processes)


class Evaluation(_Section):
    prompts: PositiveInt
    noises: PositiveInt
    batch: PositiveInt
    quality_prompts: PositiveInt
    trajectory_prompts: PositiveInt

    @property
    def drawn(self) -> int:
        """Samples at once where no derivative is taken: twice as many."""
        return 2 * self.batch


class Nearby(_Section):
    sizes: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]


class Judge(_Section):
    """Training of the world's OpenCLIP model."""

    steps: PositiveInt
    batch: Annotated[int, Field(ge=2)]
    lr: Positive
    warmup: NonNegativeInt
    scenes: PositiveInt


class Uses(_Section):
    """Sizes of Tables 2, 3, 5, 6 and Figure 5."""

    seeds: Annotated[int, Field(ge=3)]
    prompts: Annotated[int, Field(ge=2)]
    train: Annotated[int, Field(ge=2)]  # Table 2 also learns from half of them
    fit: PositiveInt
    library: PositiveInt
    picks: PositiveInt
    query: PositiveInt
    layouts: Annotated[int, Field(ge=2)]
    evals: PositiveInt
    scale: Positive
    sweep: list[Positive]
    draws: PositiveInt

    @model_validator(mode="after")
    def _fits(self):
        if self.train >= self.prompts:
            raise ValueError(f"train={self.train} leaves none of prompts={self.prompts} to test on: lower it")
        if self.query > self.prompts:
            raise ValueError(f"query={self.query} is more than prompts={self.prompts}: lower it")
        if self.library < 2 * self.picks:
            least = 2 * self.picks
            raise ValueError(f"library={self.library} is less than twice picks={self.picks}: make it {least} or more")
        return self


class Report(_Section):
    """Resamples behind each interval, and the numbers of the rule behind each verdict (gad/claims.py)."""

    bootstrap: PositiveInt
    loss: NonNegative
    clip: NonNegative
    pickscore: NonNegative
    shift: NonNegative
    match: Positive
    most: Annotated[float, Field(ge=0.5, lt=1)]


class Params(_Section):
    threads: PositiveInt
    seeds: Seeds
    gad: Gad
    base: Base
    controls: dict[str, Annotated[
        Annotated[Control, Tag(TERM)] | Annotated[Plain, Tag(PLAIN)],
        Discriminator(_kind),
    ]]
    grid: Grid
    further: Further
    published: dict[str, Published] = {}
    backbones: dict[str, BackboneParams]
    coco: Coco = Coco()
    autoencoder: dict[Literal["kl", "dc"], AutoencoderParams]
    teacher: Teacher
    endpoints: Endpoints
    distill: Distill
    hardware: Hardware = Hardware()
    paradigms: dict[str, dict[str, float]]
    evaluation: Evaluation
    nearby: Nearby
    judge: Judge
    uses: Uses
    report: Report

    @model_validator(mode="after")
    def _known(self):
        # By file names: importing the registries would cost every command the import of torch.
        backbones = {f.stem for f in (ROOT / "gad/backbones").glob("*.py")} - {"__init__", "base", "tokens"}
        paradigms = {f.stem for f in (ROOT / "gad/paradigms").glob("*.py")} - {"__init__", "base", "forms"}
        checks = []
        for key, block in self.blocks.items():
            if not block.runs(self.seeds.distill):
                continue
            variants = self.controls if block in self.further.controlled else ("base", "gad")
            checks += [
                # teachers are made for the grid's backbones
                (f"{key}.backbones", block.backbones, self.backbones if key == "grid" else self.grid.backbones,
                 "the backbones section" if key == "grid" else "grid.backbones"),
                (f"{key}.paradigms", block.paradigms, self.paradigms, "the paradigms section"),
                (f"{key}.variants", block.variants, variants, "the controls section or base and gad"),
            ]
        for key, names, known, where in (
            *checks,
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

    def _check_terms(self):
        terms = {"gad": self.gad} | {f"controls.{name}": control for name, control in self.controls.items()}
        for key, term in terms.items():
            if not term.lam:
                continue
            for switch, why in (("shard", "need whole networks"), ("checkpointing", "cannot make activations anew")):
                if term.scheme == "exact" and getattr(self.hardware, switch):
                    fix = f"set it to false, or {key}.scheme to forward"
                    raise ValueError(f"hardware.{switch}=True: exact JVPs {why}: {fix}")
            if term.pairs < (least := TOGETHER.get(term.form, 1)):
                fix = f"make it {least} or more"
                raise ValueError(f"{key}.pairs={term.pairs}: `{term.form}` is of several samples: {fix}")

    def _check_paradigms(self):
        for name, settings in self.paradigms.items():
            known = _settings(name)
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
        return ["base", "gad", *self.controls]


class Run(tuple):
    """A student's identity: (backbone, paradigm, variant, seed)."""

    def __new__(cls, backbone: str, paradigm: str, variant: str, seed: int):
        return super().__new__(cls, (backbone, paradigm, variant, int(seed)))

    backbone = property(lambda self: self[0])
    paradigm = property(lambda self: self[1])
    variant = property(lambda self: self[2])
    seed = property(lambda self: self[3])

    def __str__(self):
        return "-".join(map(str, self))


class ParamsError(ValueError):
    """A mistake in params.yaml."""


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """`1e-05`, a string in YAML 1.1, is a number: DVC's `-S` writes it so."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def load(path: Path | str = ROOT / "params.yaml", **overrides) -> Params:
    """Read and validate. `overrides`: dotted keys, `load(**{"gad.h": 0.02})`.

    Raises ParamsError with one line a mistake: key, value, fix.
    """
    try:
        data = yaml.load(Path(path).read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist: run from the repository, or give --params") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}; give a file as --params") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
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
