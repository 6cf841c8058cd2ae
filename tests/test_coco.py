"""COCO's captions and boxes from files in its format."""

import csv
import hashlib
import json
import os
import random
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import numpy as np
import pytest

from gad import paths
from gad.params import ROOT
from gad.world import coco
from gad.world.coco import Coco, build, fetch
from gad.world.prompts import sample_prompts

# A miniature of COCO's two files. The comments give the place of an image in the draw of seed 0, by
# `printf '0 image 11' | sha256sum`: 12, 11, 3, 5, 8, 10, 1, 2, 4, 7, 6, 9.
CATEGORIES = {"person": 1, "bus": 6, "cat": 17, "dog": 18, "sheep": 20, "hot dog": 58, "chair": 62, "cell phone": 77}
CAPTION_OF = {
    12: ["  "],  # none: left out
    11: ["People in a street."],
    3: ["Two dogs and a cat"],  # a plural
    5: ["A bus stop beside a bus-lane"],  # neither is a bus
    8: ["DOG with   a Sheep\n"],
    10: ["One kitten", "A white cat"],  # captions 100 and 101: the draw has 100 first
    1: ["A dog on a chair."],
    2: ["Someone phones", "A hand", "A man holds a phone."],  # captions 20, 21 and 22: the draw has 22 first
    4: ["A hot dog next to a dog"],  # where is "dog"?
    7: ["a dog on a CHAIR!", "A dog."],  # the first is image 1's
    6: ["A woman and a boy."],  # a second mention
    9: ["A dog on a chair"],  # image 1's: left out
}
BOXES = [  # image, category, x, y, width, height in pixels of 200 × 100 (image 10: 100 × 400), crowd
    (3, "dog", 0, 0, 100, 50, 0), (3, "cat", 0, 50, 22, 20, 0),
    (5, "bus", 0, 0, 100, 100, 0),
    (8, "dog", 20, 0, 80, 50, 0), (8, "dog", 100, 0, 100, 100, 1), (8, "sheep", 150, 50, 80, 60, 0),  # past the edge
    (10, "cat", 10, 100, 50, 200, 0),
    (1, "dog", 20, 10, 100, 50, 0), (1, "chair", 0, 0, 50, 100, 0), (1, "dog", 0, 0, 10, 10, 0),  # 0.5 %: tiny
    (2, "person", 100, 0, 100, 100, 0), (2, "cell phone", 0, 0, 19, 20, 0),  # 1.9 %: tiny
    (4, "hot dog", 0, 0, 100, 100, 0), (4, "dog", 100, 0, 100, 100, 0),
    (7, "dog", 0, 0, 100, 100, 0), (7, "dog", 100, 0, 100, 100, 0),  # which?
    (6, "person", 0, 0, 100, 100, 0),
]
DRAWN = [
    (11, "People in a street."), (3, "Two dogs and a cat"), (5, "A bus stop beside a bus-lane"),
    (8, "DOG with a Sheep"), (10, "One kitten"), (1, "A dog on a chair."), (2, "A man holds a phone."),
    (4, "A hot dog next to a dog"), (7, "A dog."), (6, "A woman and a boy."),
]
OBJECTS = {
    3: [("cat", "cat", [0, 0.5, 0.11, 0.7])],
    8: [("dog", "DOG", [0.1, 0, 0.5, 0.5]), ("sheep", "Sheep", [0.75, 0.5, 1, 1])],
    10: [("cat", "kitten", [0.1, 0.25, 0.6, 0.75])],
    1: [("dog", "dog", [0.1, 0.1, 0.6, 0.6]), ("chair", "chair", [0, 0, 0.25, 1])],
    2: [("person", "man", [0.5, 0, 1, 1])],
    4: [("hot dog", "hot dog", [0, 0, 0.5, 1])],
}


def miniature(folder, shuffled=None):
    captions = [
        {"image_id": i, "id": 10 * i + k, "caption": c} for i, own in CAPTION_OF.items() for k, c in enumerate(own)
    ]
    images = [{"id": i, "width": 100 if i == 10 else 200, "height": 400 if i == 10 else 100} for i in CAPTION_OF]
    boxes = [
        {"id": k, "image_id": i, "category_id": CATEGORIES[name], "bbox": list(map(float, box)), "iscrowd": crowd,
         "area": 1.0, "segmentation": []}
        for k, (i, name, *box, crowd) in enumerate(BOXES)
    ]
    categories = [{"supercategory": "any", "id": k, "name": name} for name, k in CATEGORIES.items()]
    if shuffled is not None:
        for rows in (captions, images, boxes, categories):
            random.Random(shuffled).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"info": {"year": 2014}, "licenses": []}
    for name, data in (
        ("captions_val2014.json", {"images": images, "annotations": captions}),
        ("instances_val2014.json", {"images": images, "annotations": boxes, "categories": categories}),
    ):
        (folder / name).write_text(json.dumps(about | data))
    return folder


def table(folder):
    with (folder / "prompts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Frozen files


def test_build_by_hand(tmp_path):
    made = build(miniature(tmp_path / "raw"), tmp_path / "out", seed=0, test=9, unseen=1, layouts=6)
    assert made == {"unseen": 1, "test": 9, "train": 0, "layouts": 6}
    assert [(int(r["image_id"]), r["caption"]) for r in table(tmp_path / "out")] == DRAWN
    rows = [json.loads(line) for line in (tmp_path / "out/layouts.jsonl").read_text().splitlines()]
    assert [(r["image_id"], r["caption"]) for r in rows] == [d for d in DRAWN if d[0] in OBJECTS]
    for row in rows:
        assert [(o["name"], o["phrase"], o["box"]) for o in row["objects"]] == OBJECTS[row["image_id"]]
    assert sorted(os.listdir(tmp_path / "out")) == ["layouts.jsonl", "prompts.csv"]


def test_splits_are_disjoint_and_layouts_are_test_images(tmp_path):
    made = build(miniature(tmp_path), tmp_path, seed=0, test=3, unseen=2, layouts=1)
    assert made == {"unseen": 2, "test": 3, "train": 5, "layouts": 1}
    found = {s: [int(r["image_id"]) for r in table(tmp_path) if r["split"] == s] for s in made}
    assert found == {"unseen": [11, 3], "test": [5, 8, 10], "train": [1, 2, 4, 7, 6], "layouts": []}
    assert json.loads((tmp_path / "layouts.jsonl").read_text())["image_id"] == 8


def test_build_depends_on_seed_and_not_on_the_order_of_rows(tmp_path):
    names = ("prompts.csv", "layouts.jsonl")
    made = []
    for k, (shuffled, seed) in enumerate([(None, 0), (1, 0), (2, 0), (None, 1)]):
        out = tmp_path / str(k)
        build(miniature(tmp_path / "raw", shuffled), out, seed, test=7, unseen=1, layouts=1)
        made.append([(out / name).read_bytes() for name in names])
    assert made[0] == made[1] == made[2] and made[0][0] != made[3][0]


@pytest.mark.parametrize(
    "name, plural",
    [("dog", "dogs"), ("bus", "buses"), ("bench", "benches"), ("toothbrush", "toothbrushes"), ("lady", "ladies"),
     ("boy", "boys"), ("wine glass", "wine glasses"), ("man", "men"), ("person", "people"), ("mouse", "mice"),
     ("sheep", "sheep"), ("hair drier", "hair driers")],
)
def test_plurals(name, plural):
    assert coco._plural(name) == plural


@pytest.mark.parametrize(
    "caption, found",
    [
        ("A woman on a motor bike near a traffic light", [("person", "woman"), ("traffic light", "traffic light")]),
        ("A manhole, a fireman and a cat-like toy", []),
        ("a teddy bear at a train station", [("teddy bear", "teddy bear")]),
        ("Cats watch the cat", []),
        ("the cat's bowl", [("cat", "cat")]),
    ],
)
def test_what_a_caption_names(caption, found):
    assert coco._reader(["person", "bear", "teddy bear", "train", "cat", "traffic light"])(caption) == found


@pytest.mark.parametrize(
    "caption, found",
    [
        ("An orange cat on a couch", ["cat", "couch"]),
        ("An orange, black and white cat", ["cat"]),
        ("an orange and white cat", ["cat"]),
        ("A cat beside an orange", ["cat", "orange"]),
        ("The orange, an apple and a cat", ["orange", "apple", "cat"]),
        ("an orange on an orange couch", ["couch"]),  # which word means the fruit? "orange" is there twice
        ("a man on a jet ski", ["man"]),
        ("a bed room with a record player and toilet paper", []),
        ("Two jet skis and a cow girl", []),
    ],
)
def test_a_colour_or_a_compound_names_no_object(caption, found):
    read = coco._reader(["person", "airplane", "cat", "cow", "orange", "apple", "couch", "bed", "toilet"])
    assert [phrase for _, phrase in read(caption)] == found


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"test": 10, "unseen": 1, "layouts": 1}, "unseen=1, test=10: captions_val2014.json has 10 images: lower test"),
        ({"test": 9, "unseen": 1, "layouts": 7}, "layouts=7: the 9 test captions name boxes in 6 images: raise test"),
    ],
)
def test_too_few_images(sizes, said, tmp_path):
    with pytest.raises(ValueError) as error:
        build(miniature(tmp_path / "raw"), tmp_path / "out", seed=0, **sizes)
    assert str(error.value) == said and not (tmp_path / "out").exists()


def test_files_that_are_not_cocos(tmp_path):
    def build_says(said):
        with pytest.raises(ValueError, match=said) as error:
            build(tmp_path, tmp_path, 0, test=3, unseen=1, layouts=1)
        assert "\n" not in str(error.value)

    captions, instances = (miniature(tmp_path) / name for name in coco.FILES)
    text = instances.read_text()
    instances.unlink()
    build_says(r"instances_val2014\.json does not exist: fetch it")
    instances.write_text(captions.read_text())
    build_says(r"has no 'categories' with id, name: it is not COCO's instances_val2014\.json")
    captions.write_text(text)
    build_says(r"has no 'annotations' with id, image_id, caption: it is not COCO's captions_val2014\.json")
    captions.write_text(text[:100])
    build_says(r"captions_val2014\.json is not JSON .*: remove it and fetch again")


# Fetching


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `server.files` on this machine. `server.asked`: the Range of each request; `cut`: bytes sent, of all."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content, asked = server.files.get(self.path), self.headers["Range"]
            server.asked.append(asked)
            if content is None:
                return self.send_error(404)
            start = int(asked.removeprefix("bytes=")[:-1]) if asked and server.ranges else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:server.cut])

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.ranges, server.cut = [], True, None
    raw, archive = miniature(tmp_path / "served"), tmp_path / "served/a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in (*coco.FILES, "captions_train2014.json"):
            zipped.write(raw / name if name in coco.FILES else __file__, f"annotations/{name}")
    server.files = {"/a.zip": archive.read_bytes()}
    server.url = f"http://127.0.0.1:{server.server_port}/a.zip"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_fetch_takes_two_files_and_pins_what_it_saw(server, tmp_path, capsys):
    out, content = tmp_path / "out", server.files["/a.zip"]
    sha256 = hashlib.sha256(content).hexdigest()
    made = fetch(out, server.url)
    assert sorted(os.listdir(out)) == sorted([*coco.FILES, "source.json"])
    for name in coco.FILES:
        assert (out / name).read_bytes() == (tmp_path / "served" / name).read_bytes()
    assert made["archive"] == {"size": len(content), "sha256": sha256} and made["url"] == server.url
    assert made == json.loads((out / "source.json").read_text())
    assert capsys.readouterr().out == f"a.zip: size {len(content)}, sha256 {sha256}\n"
    assert fetch(out, server.url, sha256, len(content)) == made and server.asked == [None]  # nothing to download
    with pytest.raises(RuntimeError, match=f"a.zip has sha256 {sha256}, not {'0' * 64}: remove"):
        fetch(out, server.url, "0" * 64)
    (out / coco.FILES[0]).unlink()  # a later fetch must see the same archive
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as zipped:
        zipped.writestr("other", "")
    server.files["/a.zip"] = (tmp_path / "other.zip").read_bytes()
    with pytest.raises(RuntimeError, match=rf"a\.zip has size 1\d\d, not {len(content)}: it is removed"):
        fetch(out, server.url)
    server.files["/a.zip"] = content
    assert fetch(out, server.url) == made


def test_fetch_refuses_another_file_than_asked_for(server, tmp_path):
    size = len(server.files["/a.zip"])
    for wanted, said in (({"size": 7}, f"a.zip has size {size}, not 7"), ({"sha256": "a" * 64}, "a.zip has sha256")):
        with pytest.raises(RuntimeError, match=said) as error:
            fetch(tmp_path / "out", server.url, **wanted)
        assert "\n" not in str(error.value) and os.listdir(tmp_path / "out") == []
    with pytest.raises(ValueError, match="sha256='abc': give 64 hexadecimal digits"):
        fetch(tmp_path / "out", server.url, sha256="abc")


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_where_it_stopped(ranges, server, tmp_path):
    out, size = tmp_path / "out", len(server.files["/a.zip"])
    server.ranges, server.cut = ranges, 100
    with pytest.raises(RuntimeError, match=rf"it ended after 100 of {size} bytes: fetch again") as error:
        fetch(out, server.url)
    assert "\n" not in str(error.value) and os.listdir(out) == ["a.zip.part"]
    server.cut = None
    assert fetch(out, server.url)["archive"]["size"] == size
    assert server.asked == [None, "bytes=100-"]


def test_fetch_takes_a_part_that_is_whole(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(server.files["/a.zip"])
    assert set(fetch(tmp_path, server.url)["files"]) == set(coco.FILES)


def test_fetch_says_what_to_do(server, tmp_path):
    by_hand = r"put captions_val2014\.json and instances_val2014\.json into .* by hand"
    with pytest.raises(RuntimeError, match=f"404.*{by_hand}"):
        fetch(tmp_path, server.url.replace("a.zip", "b.zip"))
    server.files["/c.zip"] = b"no zip"
    with pytest.raises(RuntimeError, match=r"c\.zip is damaged .* and is removed: fetch again"):
        fetch(tmp_path, server.url.replace("a.zip", "c.zip"))
    assert not (tmp_path / "c.zip").exists()
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match=f"refused.*{by_hand}") as error:
        fetch(tmp_path, server.url)
    assert "\n" not in str(error.value)


def test_fetch_takes_files_put_there_by_hand(tmp_path, capsys):
    made = fetch(miniature(tmp_path), "http://nowhere.invalid/a.zip", "0" * 64)
    assert made["archive"] is None and made["url"] is None
    assert "by hand: their archive can't be checked" in capsys.readouterr().out
    (tmp_path / coco.FILES[0]).write_text("{}")
    with pytest.raises(RuntimeError, match=r"captions_val2014\.json has size 2, not \d+"):
        fetch(tmp_path)


# What stages ask for


@pytest.fixture
def world(tmp_path):
    build(miniature(tmp_path / "raw"), tmp_path / "coco", seed=0, test=5, unseen=2, layouts=4)
    return tmp_path / "coco"


def test_prompts_of_each_split(world):
    texts, its = [text for _, text in DRAWN], Coco(world)
    assert sorted(its.prompts(2, 1, "unseen")) == sorted(texts[:2])
    assert sorted(its.prompts(5, 1, "test")) == sorted(texts[2:7])
    assert its.prompts(3, 1, "test") == its.prompts(5, 1, "test")[:3]
    assert len({tuple(its.prompts(5, seed, "test")) for seed in range(9)}) > 1
    train = its.prompts(8, 1)
    assert set(train) == set(texts[7:]) and train[3:] == train[:5]
    for arguments, said in (
        ((6, 0, "test"), "n=6: prompts.csv has 5 test prompts: lower n"),
        ((1, 0, "val"), "split='val' is unknown: use one of unseen, test, train"),
    ):
        with pytest.raises(ValueError, match=said):
            its.prompts(*arguments)


def test_training_prompts_come_from_a_file(world, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("id,words\n1,one\n2,two\n3,three\n")
    its = Coco(world, path, "words")
    assert its.prompts(2, 4) == sample_prompts(path, 2, 4, "words")
    assert set(its.prompts(3, 4)) == {"one", "two", "three"}
    assert its.prompts(2, 4, "test") == Coco(world).prompts(2, 4, "test")
    path = path.rename(tmp_path / "raw/prompts.csv")  # COCO's own name: both are known by their hashes
    its = Coco(world, path, "words").hashes()
    assert its.keys() == {"prompts.csv", "layouts.jsonl", "train: prompts.csv"}
    assert its["prompts.csv"] == Coco(world).hashes()["prompts.csv"] != its["train: prompts.csv"]
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        Coco(world, tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"prompts\.csv does not exist: set coco"):
        Coco(tmp_path)


def test_layouts(world):
    its = Coco(world)
    drawn, names = its.layouts(4, 2), its.categories(4, 2)
    assert {caption for caption, *_ in drawn} == {text for image, text in DRAWN if image in (8, 10, 1, 2)}
    for (caption, phrases, boxes), own in zip(drawn, names, strict=True):
        expected = OBJECTS[next(image for image, text in DRAWN if text == caption)]
        assert list(zip(own, phrases, strict=True)) == [o[:2] for o in expected]
        np.testing.assert_array_equal(boxes, [o[2] for o in expected])
    assert [d[0] for d in its.layouts(2, 2)] == [d[0] for d in drawn[:2]]
    with pytest.raises(ValueError, match=r"n=5: layouts\.jsonl has 4 layouts: lower n"):
        its.layouts(5, 2)


def test_the_notebook_makes_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    miniature(tmp_path / "coco/annotations")
    names = {}
    for cell in nbformat.read(ROOT / "notebooks/00_coco.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)  # the runner is tested in test_pipeline.py
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"test": 7, "unseen": 2, "layouts": 4}
    assert len(table(tmp_path / "coco")) == len(DRAWN)
    assert sorted(names["names"]) == ["cat", "chair", "dog", "dog", "person", "sheep"]
