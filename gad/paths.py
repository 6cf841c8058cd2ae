"""Where the pipeline keeps what it makes; `dvc.yaml` names the same places."""

from .params import ROOT, Run

DATA, REPORTS = ROOT / "data", ROOT / "reports"
TABLES, FIGURES, METRICS = REPORTS / "tables", REPORTS / "figures", REPORTS / "metrics.json"


def autoencoder(kind: str):
    return DATA / "autoencoder" / kind


def teacher(backbone: str):
    return DATA / "teachers" / backbone


def teacher_metrics(backbone: str):
    return DATA / "metrics" / f"teacher-{backbone}.json"


def diagnosis(backbone: str):
    return DATA / "diagnosis" / backbone


def endpoints(backbone: str):
    return DATA / "endpoints" / backbone


def student(run: Run):
    return DATA / "students" / str(run)


def log(run: Run):
    return DATA / "logs" / f"{run}.csv"


def probe(run: Run):
    return DATA / "probes" / f"{run}.csv"


def result(run: Run):
    return DATA / "results" / f"{run}.json"


def nearby(backbone: str):
    return DATA / "nearby" / backbone


def chain(run: Run):
    return DATA / "chains" / f"{run}.json"


def judge():
    return DATA / "judge"


def references(backbone: str):
    return DATA / "references" / backbone


def use(run: Run):
    return DATA / "uses" / f"{run}.json"


def sample_grid(run: Run):
    return DATA / "samples" / f"{run}.png"


def tracking():
    """What trackers write; never an output."""
    return DATA / "tracking"


def embeddings():
    """Encoded prompts; never an output, removed by `make clean`."""
    return DATA / ".resume" / "embeddings"


def resume(name: str):
    """Resumable training state; never an output, removed by `make clean`."""
    return DATA / ".resume" / name
