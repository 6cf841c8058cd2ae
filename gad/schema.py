"""The sections of params.yaml: keys, types, ranges and defaults. What they must be to each other: params.py."""

from itertools import product
from typing import Annotated, Any, Literal

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
    model_validator,
)

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


def _fail(message):
    raise ValueError(message)


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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)  # true is no 1.0, "no" no false


SEEDS = range(2**31)
Seed = Annotated[int, Field(ge=SEEDS.start, lt=SEEDS.stop)]


class Seeds(Section):
    world: Seed
    distill: Annotated[list[Seed], Field(min_length=1)]

    @property
    def told(self) -> str:
        """Those of distillation, in words."""
        one = len(self.distill) == 1
        return f"one distillation seed ({self.distill[0]})" if one else f"distillation seeds {str(self.distill)[1:-1]}"


class Gad(Section):
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


class Base(Section):
    lam: Annotated[float, Field(ge=0, le=0)]


class _Varied(Section):
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


class Block(Section):
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

    seeds: list[Seed]

    def runs(self, seeds: list[int]) -> list["Run"]:
        return super().runs(self.seeds)


class Further(Section):
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


class BackboneParams(Section):
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


class Published(Section):
    """A few-step checkpoint of others, as a row of every table. `path`: a pipeline folder or hub id of the backbone's
    kind; or `lora`: a LoRA on the backbone's own network, a folder, safetensors file or hub id (`file` in it)."""

    backbone: str
    paradigm: str  # the name its rows have
    path: str | None = None
    lora: str | None = None
    file: str | None = None
    revision: str | None = None
    variant: str | None = None  # of a pipeline's files, such as "fp16"
    steps: PositiveInt | None = None  # it is sampled in; null: the backbone's student_steps

    @model_validator(mode="after")
    def _one(self):
        if (self.path is None) == (self.lora is None):
            raise ValueError("needs either path or lora: give one of them")
        return self


class Expert(Section):
    """A judge of photographs: a folder or hub id, and its revision."""

    path: str
    revision: str | None = None


class Coco(Section):
    """The world of photographs. `archives`: the annotations to fetch, none where no backbone is of this world.
    `prompts`: a file of training prompts in place of COCO's own captions, and the `column` that holds them."""

    archives: list[Literal["val2014"]] = []
    test: PositiveInt = 10_000
    unseen: PositiveInt = 200
    layouts: PositiveInt = 800
    prompts: str | None = None
    column: str | None = None
    judges: dict[Literal["openclip", "pickscore", "dinov2", "rt-detr", "grounding-dino"], Expert] = {}


class AutoencoderParams(Section):
    steps: PositiveInt
    batch: PositiveInt
    lr: Positive
    compile: bool


class Cycle(Section):
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
    seed: Seed = 0


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


class Endpoints(Section):
    pairs: PositiveInt
    probes: PositiveInt
    samples: PositiveInt


class Distill(Section):
    """Training of students. `fp32`: backbones that train in fp32 whatever the `precision` of the others."""

    batch: PositiveInt
    prompts: PositiveInt
    steps: PositiveInt
    warmup: PositiveInt
    ema: Average
    clip: Positive
    save_every: PositiveInt
    precision: Precision
    fp32: list[str] = []
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"

    @property
    def identity(self) -> dict:
        """What fixes a student. Defaults are left out: a new key with one makes no student another."""
        return self.model_dump(exclude_defaults=True)


class Hardware(Section):
    """How a student's training fits a machine. Results are the same but for rounding: no stage depends on it."""

    parts: PositiveInt = 1
    checkpointing: bool = False
    shard: bool = False
    compile: bool = False
    tangents: PositiveInt = 32

    def accumulate(self, processes: int) -> int:
        """Parts that each of so many processes takes, one after another."""
        return -(-self.parts // processes)


class Evaluation(Section):
    prompts: PositiveInt
    noises: PositiveInt
    batch: PositiveInt
    quality_prompts: PositiveInt
    trajectory_prompts: PositiveInt

    @property
    def drawn(self) -> int:
        """Samples at once where no derivative is taken: twice as many."""
        return 2 * self.batch


class Differences(Section):
    """The study of finite differences: their `sizes`, h, and the `noises` on the weights of known students."""

    sizes: Annotated[list[Positive], Field(min_length=1)]
    noises: Annotated[list[Positive], Field(min_length=1)]


class Nearby(Section):
    sizes: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]


class Judge(Section):
    """Training of the world's OpenCLIP model."""

    steps: PositiveInt
    batch: Annotated[int, Field(ge=2)]
    lr: Positive
    warmup: NonNegativeInt
    scenes: PositiveInt


class Uses(Section):
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


class Report(Section):
    """Resamples behind each interval, and the numbers of the rule behind each verdict (gad/claims.py)."""

    bootstrap: PositiveInt
    loss: NonNegative
    clip: NonNegative
    pickscore: NonNegative
    shift: NonNegative
    match: Positive
    most: Annotated[float, Field(ge=0.5, lt=1)]
    usable: Annotated[float, Field(gt=0, lt=1)] = 0.85


class Sections(Section):
    """The whole of params.yaml."""

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
    differences: Differences
    nearby: Nearby
    judge: Judge
    uses: Uses
    report: Report
