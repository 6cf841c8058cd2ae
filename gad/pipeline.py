"""The notebook runner that `dvc.yaml` calls, and the commands of the Makefile.

python -m gad.pipeline notebooks/03_distill.ipynb OUT.ipynb --set backbone=sd2 paradigm=tdm variant=gad seed=0
python -m gad.pipeline reproduce --jobs 2 --fresh students
"""

import argparse
import ast
import os
import re
import sys
from pathlib import Path

try:
    from . import graph, paths
    from .graph import PROGRESS, PipelineError
    from .params import ROOT, Params, ParamsError, Run, assignment, load, out_of_memory
    from .schema import SEEDS
except ModuleNotFoundError as error:
    sys.exit(f"gad: {error}: activate the project's environment (. .venv/bin/activate), or use make")

def execute(source: Path, target: Path, parameters: dict):
    """Run notebook `source` with `parameters` and write it to `target`, the same bytes each time.

    One that fails stays in data/.resume/notebooks. Raises PipelineError.
    """
    p = load()
    notebook = _read(source)
    _check(source, notebook, parameters, p)
    os.environ.update(environment(p.threads))
    os.environ.pop("MPLBACKEND", None)  # figures go inline
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's check of IRIs, of which there are none: 2 s
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    running = paths.resume("notebooks") / target.name
    running.parent.mkdir(parents=True, exist_ok=True)
    kept = f"(see {running.relative_to(ROOT)})"
    try:
        done = papermill.execute_notebook(
            notebook,
            str(running),
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=str(ROOT),
            start_timeout=300,
            stderr_file=_Terminal(),
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),  # or ipykernel warns
        )
    except PapermillExecutionError as error:
        if error.ename == "OutOfMemoryError":
            raise PipelineError(f"{out_of_memory(str(error.evalue))} {kept}") from None
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        raise PipelineError(f"{error.ename}: {last} {kept}") from None
    except RuntimeError:  # nbclient's, and jupyter_client's of one that never answered
        raise PipelineError(f"the kernel of {source.name} died, perhaps out of memory {kept}") from None
    running.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(scrub(done), target)


def environment(threads: int) -> dict[str, str]:
    """What a stage's process must see for its bits and its notebook to repeat."""
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        "PYTHONPATH": str(ROOT),  # a copy of the repository runs its own code
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


class _Terminal:
    """Passes a notebook's progress lines on, and none of its warnings."""

    def write(self, text):
        for line in text.splitlines():
            if PROGRESS.search(line):
                print(line, file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def scrub(notebook):
    """Drop what differs between two runs: times, cell ids, versions, stderr, how stdout was cut in pieces,
    addresses of objects."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = str(i)
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
            if kept and output.get("name") == "stdout" == kept[-1].get("name"):
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept
    return notebook


def defaults(notebook) -> list[str] | None:
    """The names assigned in the cell tagged `parameters`; None without such a cell."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            nodes = (n for n in ast.parse(cell.source).body if isinstance(n, ast.Assign))
            return [target.id for n in nodes for target in n.targets]
    return None


def _read(path: Path):
    import nbformat

    if not path.is_file():
        raise PipelineError(f"{path} does not exist")
    try:
        return nbformat.read(path, 4)
    except (ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError):  # no JSON, or some other
        raise PipelineError(f"{path} is not a notebook, or half of one: `git checkout` it") from None


def _write(notebook, path: Path):
    import nbformat

    part = path.with_suffix(".part")
    nbformat.write(notebook, part)
    os.replace(part, path)


def _check(source: Path, notebook, parameters: dict, p: Params):
    names = defaults(notebook)
    if names is None:
        raise PipelineError(f"{source} has no cell tagged 'parameters'")
    choices = {
        "kind": p.autoencoder, "backbone": p.backbones, "paradigm": p.names, "variant": p.variants,
    }
    for name, value in parameters.items():
        if name not in names:
            raise PipelineError(f"{name}={value}: {source.name} takes {', '.join(names) or 'no parameters'}")
        if name == "seed" and value not in SEEDS:
            raise PipelineError(f"seed={value} is no seed: give 0 to {SEEDS[-1]}")
        if value not in choices.get(name, [value]):
            raise PipelineError(f"{name}={value} is unknown: there are {', '.join(choices[name])}")
    if source.name == "03_distill.ipynb" and {"paradigm", "variant"} <= parameters.keys():
        p.check_forms([Run(parameters.get("backbone", ""), parameters["paradigm"], parameters["variant"], 0)])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        "gad.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if argv and argv[0].endswith(".ipynb"):
        parser.add_argument("source", type=Path)
        parser.add_argument("target", type=Path)
        parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    else:
        commands = parser.add_subparsers(dest="command", required=True)
        for name, text in (
            ("reproduce", "fetch what ships, run what is missing or changed"),
            ("smoke", "the whole graph from nothing at its smallest, in a temporary copy"),
            ("demo", "one student without and one with GAD, in demo/"),
        ):
            command = commands.add_parser(name, help=text)
            command.add_argument("--jobs", type=_positive, default=2, help="stages side by side (2)")
            if name == "reproduce":
                command.add_argument("--fresh", choices=("grid", "students", "all", "1"), help="run them again")
            if name == "smoke":
                command.add_argument("--keep", type=Path, metavar="FOLDER", help="the copy stays there")
            if name == "demo":
                command.add_argument("--backbone", help="of the students (the grid's last)")
    args = parser.parse_args(argv)
    try:
        if "source" in args:
            execute(args.source, args.target, dict(map(_assignment, args.set)))
        elif args.command == "reproduce":
            graph.reproduce(args.jobs, "all" if args.fresh == "1" else args.fresh)
        elif args.command == "smoke":
            graph.smoke(args.jobs, args.keep)
        else:
            graph.demo(args.jobs, args.backbone)
    except (ParamsError, PipelineError) as error:
        print(f"gad: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "" if args.command == "smoke" else "; the same command goes on from here"
        print(f"gad: stopped{goes_on}", file=sys.stderr)
        return 130
    return 0


def _assignment(text: str):
    key, value = assignment(text)
    return key, int(value) if re.fullmatch(r"-?\d+", value) else value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
