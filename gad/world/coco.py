"""The world of the paper's scale: captions and boxes of MS-COCO val2014.

`fetch` gets COCO's annotations, `build` makes of them the two small files that stages read through `Coco`. Which
prompts the paper took is not published: every choice is ours, and said where it is made.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from .prompts import draw, filled, read_prompts, sample_prompts

URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
# As public code pins it (torchvision's prototype datasets, for one); nothing was downloaded when this was written.
SHA256 = "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"
CAPTIONS, INSTANCES = FILES = ("captions_val2014.json", "instances_val2014.json")
PROMPTS, LAYOUTS, SOURCE = "prompts.csv", "layouts.jsonl", "source.json"
SPLITS = ("unseen", "test", "train")
MIN_AREA = 0.02  # of the image; a smaller box is tiny: 5 of the 256 cells that cross-attention has at 16 × 16

# What captions call a category, beside its own name.
SYNONYMS = {
    "person": (
        "man", "woman", "boy", "girl", "child", "kid", "baby", "toddler", "lady", "guy", "player", "batter", "skier",
        "surfer", "snowboarder", "skateboarder",
    ),
    "bicycle": ("bike",), "motorcycle": ("motorbike", "motor bike"), "airplane": ("plane", "aeroplane", "jet"),
    "traffic light": ("stoplight", "stop light", "traffic signal"), "fire hydrant": ("hydrant",),
    "cat": ("kitten",), "dog": ("puppy",), "handbag": ("purse",), "tie": ("necktie",),
    "sports ball": ("ball", "soccer ball", "tennis ball"), "baseball bat": ("bat",),
    "baseball glove": ("glove", "mitt"), "skateboard": ("skate board",), "surfboard": ("surf board",),
    "snowboard": ("snow board",), "tennis racket": ("tennis racquet", "racket", "racquet"), "donut": ("doughnut",),
    "couch": ("sofa",), "potted plant": ("plant", "houseplant"), "dining table": ("table",), "tv": ("television",),
    "laptop": ("laptop computer",), "remote": ("remote control",), "cell phone": ("cellphone", "mobile phone", "phone"),
    "microwave": ("microwave oven",), "refrigerator": ("fridge",), "teddy bear": ("teddy", "stuffed bear"),
    "hair drier": ("hair dryer", "blow dryer"),
}
OTHERS = (  # name no bus, train, …
    "bus stop", "bus station", "train station", "train track", "train yard", "train platform", "train car", "rail car",
    "cable car", "street car", "car seat", "truck stop", "jet ski", "jet engine", "bike rack", "bike lane", "bike path",
    "bicycle rack", "bicycle lane", "boat house", "boat dock", "bird house", "bird bath", "bird cage", "bird feeder",
    "cat food", "dog food", "dog house", "dog bed", "corn dog", "chili dog", "rocking horse", "sheep dog", "cow boy",
    "cow girl", "zebra crossing", "tie dye", "ball field", "ball park", "ball game", "ball cap", "at bat",
    "oven mitt", "oven glove", "bottle cap", "bottle opener", "cup cake", "cup holder", "fork lift", "knife block",
    "toilet bowl", "banana bread", "banana split", "banana peel", "banana tree", "apple pie", "apple juice",
    "apple tree", "apple cider", "sandwich shop", "orange juice", "carrot cake", "pizza box", "pizza cutter",
    "pizza oven", "pizza shop", "donut shop", "cake stand", "pan cake", "chair lift", "wheel chair", "power plant",
    "bed room", "bed side", "bed spread", "flower bed", "truck bed", "table cloth", "table top", "table lamp",
    "table tennis", "toilet paper", "toilet seat", "toilet brush", "tv stand", "tv show", "laptop bag", "mouse pad",
    "mickey mouse", "keyboard player", "phone booth", "phone call", "pay phone", "toaster oven", "book shelf",
    "book case", "book store", "book bag", "note book", "clock tower", "toothbrush holder", "record player",
    "cd player", "dvd player", "music player", "vcr player", "snow man", "baby carriage", "baby stroller", "baby crib",
)
# The fruit has an article, and no noun after it: any other is a colour.
ORANGE = (
    r"(?:(?<=\ban )|(?<=\bone )|(?<=\bthe ))orange"
    r"(?=\W*$|[.;!]|,? (?:and |or )?(?:an?|the|on|in|is|at|by|to|with|next|beside|near|from|that|sits|sitting)\b)"
)
PLURALS = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "knife": "knives", "mouse": "mice",
    "sheep": "sheep", "broccoli": "broccoli", "skis": "skis", "scissors": "scissors",
}


# Annotations


def fetch(folder: Path | str, url: str = URL, sha256: str | None = None, size: int | None = None) -> dict:
    """COCO's captions_val2014.json and instances_val2014.json in `folder`, from the zip archive at `url`.

    The address is the one that COCO documents, its checksum SHA256. Of any other the archive must have `sha256` (hex)
    and `size` (bytes) where they are given, else those that an earlier fetch left in source.json; where there are none
    they are printed, and kept there. An interrupted download goes on where it stopped. Files already in `folder`, put
    there by hand, are taken as they are. Returns what source.json holds. Raises RuntimeError that says what to do.
    """
    folder = Path(folder)
    if url == URL:
        sha256 = sha256 or SHA256
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256={sha256!r}: give 64 hexadecimal digits in lower case, or none")
    folder.mkdir(parents=True, exist_ok=True)
    source, archive = folder / SOURCE, folder / url.rsplit("/", 1)[-1]
    known = json.loads(source.read_text()) if source.exists() else {}
    wanted = (known.get("archive") or {}) | {k: v for k, v in (("sha256", sha256), ("size", size)) if v is not None}
    if all((folder / name).exists() for name in FILES):
        found = known.get("archive")
        if found:
            _check(archive.name, found, wanted, f"remove {folder} and fetch again")
        else:
            print(f"{' and '.join(FILES)} were put here by hand: their archive can't be checked")
    else:
        if not archive.exists():
            _download(url, archive)
        found = _digest(archive)
        again = f"it is removed: fetch again, and if the archive is a new one, first remove {source}"
        _check(archive.name, found, wanted, again, remove=archive)
        _extract(archive)
        print(f"{archive.name}: size {found['size']}, sha256 {found['sha256']}")
    files = {name: _digest(folder / name) for name in FILES}
    for name, its in known.get("files", {}).items():
        _check(name, files[name], its, f"remove {folder} and fetch again")
    made = {"url": url if found else None, "archive": found, "files": files}
    _write(source, [json.dumps(made, indent=2)])
    archive.unlink(missing_ok=True)
    return made


def _download(url: str, archive: Path):
    """The file at `url`, from where an earlier attempt stopped if the server can."""
    part = archive.with_name(archive.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        with urlopen(Request(url, headers={"Range": f"bytes={have}-"} if have else {}), timeout=60) as response:
            have = have if response.status == 206 else 0
            total = have + int(response.headers.get("Content-Length") or 0)
            with part.open("ab" if have else "wb") as file:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    if total and (have + len(chunk)) * 20 // total > have * 20 // total:
                        print(f"{url}: {(have + len(chunk)) / total:.0%}", file=sys.stderr, flush=True)
                    have += len(chunk)
        if have < total:
            raise ConnectionError(f"it ended after {have} of {total} bytes")
    except (OSError, HTTPException) as error:
        if not (isinstance(error, HTTPError) and error.code == 416 and have):
            raise RuntimeError(
                f"{url}: {error}: fetch again (it goes on where it stopped), or put {' and '.join(FILES)} into "
                f"{archive.parent} by hand"
            ) from None
        # Nothing is left to fetch: what follows tells whether it is right.
    os.replace(part, archive)


def _extract(archive: Path):
    try:
        with zipfile.ZipFile(archive) as zipped:
            inside = {Path(name).name: name for name in zipped.namelist()}
            for name in FILES:
                if name not in inside:
                    raise RuntimeError(f"{archive} has no {name}: give another url, or put the file there by hand")
                part = archive.with_name(name + ".part")
                with zipped.open(inside[name]) as packed, part.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                os.replace(part, archive.with_name(name))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise RuntimeError(f"{archive.name} is damaged ({error}) and is removed: fetch again") from None


def _digest(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check(what: str, found: dict, wanted: dict, fix: str, remove: Path | None = None):
    for key, value in wanted.items():
        if found[key] != value:
            if remove:
                remove.unlink()
            raise RuntimeError(f"{what} has {key} {found[key]}, not {value}: {fix}")


# Frozen files


def build(folder: Path | str, out: Path | str, seed: int, test: int, unseen: int, layouts: int) -> dict[str, int]:
    """Make prompts.csv and layouts.jsonl in `out` of COCO's two files in `folder`; their numbers of rows.

    prompts.csv (image_id, split, caption): one caption an image, no two alike but for case and punctuation. An
    image keeps the first of its captions that no image before it has; without one it is left out. The first
    `unseen` images, the next `test` and all others ("train") are the splits. Order is that of SHA-256 of `seed` and
    an image's or caption's id: the same bytes whatever the files' own order and the versions of libraries.

    layouts.jsonl: the first `layouts` test images whose caption names an object that has a box, as {image_id,
    caption, objects: [{name: COCO's category, phrase: its word or words in the caption, box: x0, y0, x1, y1 in
    [0, 1] from the left and top}]}, objects in the caption's order. A category is an object where the caption
    most likely means its one box:
    - its name or a synonym stands in the caption as whole words, in the singular, once, and is nowhere part of a
      longer name ("dog" in "hot dog"); a plural, or a second mention, makes it uncertain and leaves it out;
    - the image has exactly one box of it, crowds and boxes under MIN_AREA of the image not counted.
    Captions are not parsed: of words that mean another thing, the compounds in OTHERS and the colour orange are left
    out, and no more.
    Raises ValueError for files that are missing or not COCO's, and where there are too few images.
    """
    captions = _annotations(Path(folder) / CAPTIONS, annotations=("id", "image_id", "caption"))
    instances = _annotations(
        Path(folder) / INSTANCES, images=("id", "width", "height"), categories=("id", "name"),
        annotations=("image_id", "category_id", "bbox", "iscrowd"),
    )
    drawn = _captions(captions, seed)
    if len(drawn) < unseen + test:
        raise ValueError(f"unseen={unseen}, test={test}: {CAPTIONS} has {len(drawn)} images: lower test")
    images = list(drawn)
    splits = dict(zip(SPLITS, (images[:unseen], images[unseen:unseen + test], images[unseen + test:]), strict=True))
    boxes, read = _boxes(instances), _reader([c["name"] for c in instances["categories"]])
    rows = []
    for image in splits["test"]:
        found = [
            {"name": name, "phrase": phrase, "box": boxes[image][name][0]}
            for name, phrase in read(drawn[image]) if len(boxes[image][name]) == 1
        ]
        if found and len(rows) < layouts:
            rows.append({"image_id": image, "caption": drawn[image], "objects": found})
    if len(rows) < layouts:
        raise ValueError(f"layouts={layouts}: the {test} test captions name boxes in {len(rows)} images: raise test")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / LAYOUTS, map(json.dumps, rows))
    part = out / f"{PROMPTS}.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image_id", "split", "caption"))
        writer.writerows((image, split, drawn[image]) for split, its in splits.items() for image in its)
    os.replace(part, out / PROMPTS)
    return {split: len(its) for split, its in splits.items()} | {"layouts": len(rows)}


def _annotations(path: Path, **wanted: tuple[str, ...]) -> dict:
    """COCO's JSON. `wanted`: its lists, and the keys of each one's entries."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: fetch it, or put it there by hand")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it and fetch again") from None
    for name, keys in wanted.items():
        rows = data.get(name) if isinstance(data, dict) else None
        if not rows or not isinstance(rows, list) or not set(keys) <= set(rows[0]):
            raise ValueError(f"{path} has no {name!r} with {', '.join(keys)}: it is not COCO's {path.name}")
    return data


def _captions(data: dict, seed: int) -> dict[int, str]:
    """Each image's caption, in the order of the draw."""
    own, taken, drawn = defaultdict(list), set(), {}
    for row in data["annotations"]:
        own[row["image_id"]].append((row["id"], " ".join(row["caption"].split())))
    for image in sorted(own, key=lambda i: _order(seed, "image", i)):
        for _, text in sorted(own[image], key=lambda c: _order(seed, "caption", c[0])):
            plain = " ".join(re.findall(r"\w+", text.casefold()))
            if plain and plain not in taken:
                taken.add(plain)
                drawn[image] = text
                break
    return drawn


def _order(seed: int, what: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed} {what} {number}".encode()).digest()


def _boxes(data: dict) -> dict[int, dict[str, list[list[float]]]]:
    """An image's boxes that count, by category."""
    names, sizes = {c["id"]: c["name"] for c in data["categories"]}, {i["id"]: i for i in data["images"]}
    found = defaultdict(lambda: defaultdict(list))
    for row in data["annotations"]:
        x, y, w, h = row["bbox"]
        size = np.array([sizes[row["image_id"]][side] for side in ("width", "height")] * 2)
        box = (np.array([x, y, x + w, y + h]) / size).clip(0, 1)
        if not row["iscrowd"] and (box[2:] - box[:2]).prod() >= MIN_AREA:
            found[row["image_id"]][names[row["category_id"]]].append(box.round(5).tolist())
    return found


def _reader(categories: list[str]):
    """A function from a caption to the `(category, words)` that it names once and in the singular."""
    words: dict[str, tuple[str | None, bool]] = {}  # → category, singular
    for category in (*categories, None):
        for name in (category, *SYNONYMS.get(category, ())) if category else OTHERS:
            words.setdefault(_plural(name), (category, False))
            words[name] = (category, True)
    longest_first = "|".join(ORANGE if w == "orange" else re.escape(w) for w in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])(?:{longest_first})(?![\w-])", re.IGNORECASE)

    def read(caption: str) -> list[tuple[str, str]]:
        said = defaultdict(list)
        for match in pattern.finditer(caption):
            category, singular = words[match[0].lower()]
            said[category].append((match[0], singular))
        return [
            (category, phrase) for category, ((phrase, singular), *more) in said.items()
            if category and singular and not more
            # as gad.evaluation.layout looks for it
            and len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption, re.IGNORECASE)) == 1
        ]

    return read


def _plural(name: str) -> str:
    *first, last = name.split()
    if last not in PLURALS:
        for end, new in (("([^aeiou])y$", r"\1ies"), ("(s|x|z|ch|sh)$", r"\1es"), ("$", "s")):
            if re.search(end, last):
                return " ".join([*first, re.sub(end, new, last)])
    return " ".join([*first, PLURALS[last]])


def _write(path: Path, lines: Iterable[str]):
    part = path.with_name(path.name + ".part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(part, path)


# What stages ask for


class Coco:
    """Prompts and layouts of the files that `build` made in `folder`.

    `train`: a file of training prompts, and `column` the place in it (see `read_prompts`); None for COCO's own. What
    such a file shares with the other splits is not looked for. Raises ValueError where a file is not there.
    """

    def __init__(self, folder: Path | str, train: Path | str | None = None, column: str | None = None):
        self.folder, self.train, self.column = Path(folder), train, column
        for name in (PROMPTS, LAYOUTS):
            if not (self.folder / name).is_file():
                raise ValueError(f"{self.folder / name} does not exist: set coco.archives: [val2014], `dvc repro coco`")
        if train is not None:
            read_prompts(train, column)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file that is read, by its name, a file of training prompts by `train: ` and its name."""
        files = {name: self.folder / name for name in (PROMPTS, LAYOUTS)}
        if self.train:
            files[f"train: {Path(self.train).name}"] = Path(self.train)
        return {name: _digest(path)["sha256"] for name, path in files.items()}

    def prompts(self, n: int, seed: int, split: str = "train") -> list[str]:
        """`n` prompts in random order; of a smaller n the first of these.

        "train" repeats prompts where there are fewer than `n` (see `sample_prompts`); "test" and "unseen", on which
        things are measured, are all different. Raises ValueError for another split, and for too large an `n`.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}")
        if split == "train" and self.train is not None:
            return sample_prompts(self.train, n, seed, self.column)
        with (self.folder / PROMPTS).open(newline="", encoding="utf-8") as file:
            found = draw((row["caption"] for row in csv.DictReader(file) if row["split"] == split), n, seed)
        if not found or (split != "train" and len(found) < n):
            raise ValueError(f"n={n}: {PROMPTS} has {len(found)} {split} prompts: lower n, or build more")
        return filled(found, n)

    def layouts(self, n: int, seed: int) -> list[tuple[str, list[str], np.ndarray]]:
        """`n` different (caption, phrases, boxes): the words for each of K ≥ 1 objects, as they stand in the caption,
        and their boxes (K, 4), x0, y0, x1, y1 in [0, 1] from the left and top. ValueError for too large an `n`."""
        return [
            (row["caption"], [o["phrase"] for o in row["objects"]], np.array([o["box"] for o in row["objects"]]))
            for row in self._rows(n, seed)
        ]

    def categories(self, n: int, seed: int) -> list[list[str]]:
        """COCO's names of the objects of the same `layouts`: what a detector calls them."""
        return [[o["name"] for o in row["objects"]] for row in self._rows(n, seed)]

    @property
    def number_of_layouts(self) -> int:
        with (self.folder / LAYOUTS).open(encoding="utf-8") as file:
            return sum(1 for _ in file)

    def _rows(self, n, seed):
        with (self.folder / LAYOUTS).open(encoding="utf-8") as file:
            rows = draw(map(json.loads, file), n, seed)
        if len(rows) < n:
            raise ValueError(f"n={n}: {LAYOUTS} has {len(rows)} layouts: lower n, or build more")
        return rows
