import base64
import csv
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.cache import Column, EmbeddingCache
from data.clock import read_on_clock
from data.film import make_film
from pipelines import write_report
from pipelines.cli import COMMANDS
from pipelines.run.command import UserError
from pipelines.run.files import read_json, to_json
from pipelines.run.maps import map_of, project
from pipelines.run.options import parse
from pipelines.run.recording import write_recording
from pipelines.write_report import command_line, film_of, read_table
from tests.browser import Browser
from tests.conftest import read_rows
from tests.test_commands import call, refusal

HOSTILE = "a</script><img src=x onerror=document.title=1>&quot;\"'{{ 7 * 7 }}.mp4"
"""A path: `a<` is a folder."""
ENCODER = "--fps 8 --encoder.image-size 32 64 --encoder.grid 2 4 --encoder.embedding-dimension 8 --expander.widths 16"
PREDICTOR = "--predictor.width 16 --predictor.context 3 --rollout-steps 2 --validation-horizon 5"


def shown_at(seed, frames=48):
    """Times of frames of a phone: about twelve a second, no interval as long as the other."""
    return np.concatenate([[0], np.random.default_rng(seed).uniform(0.05, 0.12, frames - 1).cumsum()]).round(3)


@pytest.fixture(scope="module")
def world(tmp_path_factory, encode_video):
    """Runs of all commands on videos whose frames carry their numbers, and the page about them."""
    folder = tmp_path_factory.mktemp("reported")
    for seed, name in enumerate(("train/0.mp4", "train/1.mp4", "val/0.mp4", "normal/0.mp4", f"test/{HOSTILE}")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        encode_video(path, shown_at(seed))
    (folder / "train" / "notes <b>.mp4").write_text("this is no video")
    cache = folder / "cache"
    common = "--steps 4 --log-every 2 --tracker none --batch-size 16"
    call("pretrain_encoder", f"--videos {folder}/train --output-dir {folder}/encoder {ENCODER} {common}")
    for split in ("train", "val", "normal", "test"):
        given = f"--encoder {folder}/encoder/encoder --fps 8 --clocks 2 --output-dir {cache}/{split}"
        call("cache_embeddings", f"--videos {folder}/{split} {given}")
    caches = f"--train-cache {cache}/train --validation-cache {cache}/val"
    call("train_predictor", f"{caches} --output-dir {folder}/predictor {PREDICTOR} {common}")
    judge = f"--cache {cache}/test --predictor {folder}/predictor"
    call("evaluate_rollout", f"{judge} --output-dir {folder}/evaluation --horizon 4")
    call("score_surprise", f"{judge} --output-dir {folder}/surprise --normal {cache}/normal --alarms-per-hour 3000")
    call("train_decoder", f"{caches} --output-dir {folder}/decoder --longest-side 32 {common} --tracker tensorboard")
    given = f"--decoder {folder}/decoder --among {cache}/train --horizon 4 --films 2 --output-dir {folder}/imagined"
    call("imagine", f"{judge} {given}")
    names = ("surprise", "encoder", "predictor", "evaluation", "decoder", "imagined")
    runs = " ".join(f"{folder}/{name}" for name in names)
    call("write_report", f"--runs {runs} --output-dir {folder}/report")
    return folder


class Page(HTMLParser):
    """What a browser finds in a page: elements with their attributes, and all text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.inside = [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text.append(data)

    def data(self, name):
        return [json.loads(attributes[name]) for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def page(world):
    return Page(world / "report" / "report.html")


def scored(world):
    """A row for each moment; of those that two clocks share the higher one."""
    rows = sorted(read_rows(world / "surprise" / "surprise.csv"), key=lambda row: float(row["energy"]))
    return sorted({row["time_s"]: row for row in rows}.values(), key=lambda row: float(row["time_s"]))


def test_numbers_are_those_of_the_files(world, page):
    (video,) = page.data("data-video")
    rows = scored(world)
    assert {name: [float(row[name]) for row in rows] for name in rows[0] if name != "video"} == video["moments"]
    events = read_rows(world / "surprise" / "events.csv")
    assert [{name: float(row[name]) for name in row if name != "video"} for row in events] == video["events"]
    assert events
    assert video["grid"] == [2, 4]
    tops, maps = (read_rows(world / "surprise" / f"{name}.csv") for name in ("peaks", "maps"))
    cells = [[float(value) for name, value in row.items() if name.startswith("cell")] for row in maps]
    assert video["maps"] == cells
    assert [{name: float(row[name]) for name in row if name != "video"} for row in tops] == video["peaks"]
    assert [divmod(np.argmax(one), 4) for one in cells] == [(int(row["row"]), int(row["column"])) for row in tops]
    curves = [
        [json.loads(line) for line in (world / name / "curve.jsonl").read_text().splitlines()]
        for name in ("encoder", "predictor")
    ]
    assert page.data("data-curve") == curves
    assert "".join(page.text).count("No collapse in 4 steps.") == 2
    assert page.data("data-skill") == [read_json(world / "evaluation" / "rollout.json")["predictors"]]
    dreams = read_json(world / "imagined" / "imagined.json")
    shown = [{name: film[name] for name in ("times_s", "nearest")} for film in dreams["films"]]
    assert [{name: one[name] for name in ("times_s", "nearest")} for one in page.data("data-dream")] == shown
    jumps = [float(attributes["data-jump"]) for _, attributes in page.elements if "data-jump" in attributes]
    assert jumps == [float(row["peak_s"]) for row in events] + [float(row["time_s"]) for row in tops]


def test_names_are_data_and_nothing_lies_outside_the_page(world, page):
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert not {"img", "b", "link", "iframe", "object"} & set(tags)
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:video/mp4;base64,")), tag
        assert not [name for name in attributes if name.startswith("on")]
    text = "".join(page.text)
    assert f"{world}/test/{HOSTILE}" in text
    assert "notes <b>.mp4" in text  # of the account: refused
    assert "refused 1" in text
    order = (
        "No training collapsed",
        "What does it imagine",
        "What surprised it?",
        "How good is the forecast",
        "Did training",
    )
    places = [text.index(one) for one in (*order, "What was trained")]
    assert places == sorted(places)
    first = read_rows(world / "surprise" / "peaks.csv")[0]
    told = f"{first['video']} at {float(first['time_s']):.2f} s, of 1 video: energy {float(first['energy']):.2f}, in"
    kind = "Most surprising" if float(first["percentile"]) >= 95 else "Nothing surprised it; most did"
    assert f"{kind}: {told}" in " ".join(text.split())


def test_a_predictor_that_learned_nothing_and_videos_without_surprise_are_said(world, tmp_path):
    for name in ("predictor", "surprise"):
        shutil.copytree(world / name, tmp_path / name)
    metrics = read_json(world / "predictor" / "metrics.json")
    (tmp_path / "predictor" / "metrics.json").write_text(json.dumps(metrics | {"best_step": 0}))
    peaks = tmp_path / "surprise" / "peaks.csv"
    rows = read_rows(peaks)
    for shown, percentile in (("Most surprising", "95.0"), ("Nothing surprised it; most did", "94.9")):
        with peaks.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(row | {"percentile": percentile} for row in rows)
        call("write_report", f"--runs {tmp_path}/predictor {tmp_path}/surprise --output-dir {tmp_path}/{percentile}")
        said = " ".join("".join(Page(tmp_path / percentile / "report.html").text).split())
        assert f"{shown}: " in said
        assert f"No step of {tmp_path}/predictor was better than none: what it imagines is a simple guess" in said


@pytest.mark.parametrize("run", ["encoder", "predictor", "evaluation", "decoder", "imagined", "surprise"])
def test_the_command_that_is_shown_is_the_one_that_ran(world, page, run, monkeypatch):
    record = read_json(world / run / "run.json")
    line = command_line(record)
    assert line in "".join(page.text)
    _, word, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [word, *words])
    module = importlib.import_module(f"pipelines.{COMMANDS[word]}")
    assert to_json(parse(module.Options, COMMANDS[word])) == record["options"]


def test_films_of_the_imagined_show_what_came_and_the_nearest_real_frames(world, read_number):
    results = read_json(world / "imagined" / "imagined.json")
    assert len(results["films"]) == 2
    for film in results["films"]:
        assert film["panels"] == ["what came", "its embeddings, decoded", "imagined, decoded", "nearest real frames"]
        assert film["video"] == f"{world}/test/{HOSTILE}"
        with av.open(str(world / "imagined" / "films" / film["film"])) as file:
            frames = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in file.decode(video=0)]
        assert len(frames) == len(film["times_s"]) == 3 + 4
        for frame, time_s, nearest in [*zip(frames, film["times_s"], film["nearest"], strict=True)][3:]:
            assert frame.shape == (3, 128, 320)
            assert read_number(frame[:, :64, :160]) == np.abs(shown_at(4) - time_s).argmin()
            seed = int(nearest[0].endswith("1.mp4"))  # of train/0.mp4 and train/1.mp4
            assert read_number(frame[:, 64:, 160:]) == np.abs(shown_at(seed) - nearest[1]).argmin()


def test_the_map_shows_moments_of_the_cache_with_their_frames(world, page, read_number):
    (shown,) = page.data("data-map")
    cache = EmbeddingCache(world / "cache" / "test")
    assert [given["value"] for tag, given in page.elements if tag == "option"] == list(shown["colours"])
    assert shown["names"] == [f"{world}/test/{HOSTILE}"] * cache.frames
    assert shown["times_s"] == shown["colours"]["time in its video"] == cache.take(cache.rows, "times_s").tolist()
    embeddings = cache.take(cache.rows).reshape(cache.frames, -1)
    places = np.stack([shown["x"], shown["y"]], axis=1)
    embeddings = (embeddings - embeddings.mean(axis=0)) / embeddings.std(axis=0).clip(min=1e-6)
    one, two = np.linalg.svd(embeddings)[1][:2]
    np.testing.assert_allclose(np.linalg.norm(places, axis=0), [one, two], rtol=1e-3)
    sheet = Image.open(io.BytesIO(base64.b64decode(shown["sheet"])))
    height, width = shown["size"]
    for number in (0, 7, cache.frames - 1):
        left, top = number % shown["across"] * width, number // shown["across"] * height
        thumb = sheet.crop((left, top, left + width, top + height)).resize((80, 32))
        frame = np.abs(shown_at(4) - shown["times_s"][number]).argmin()
        assert read_number(np.asarray(thumb).transpose(2, 0, 1)) == frame


def test_tensorboard_shows_what_is_decoded_and_the_embeddings_with_their_pictures(world):
    logs = world / "decoder" / "logs" / "train_decoder"
    events = EventAccumulator(str(logs), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["true above, decoded below"]
    assert len(events.Images("true above, decoded below")) == 2
    rows = np.loadtxt(next(logs.rglob("tensors.tsv")))
    cache = EmbeddingCache(world / "cache" / "val")
    np.testing.assert_allclose(rows, cache.take(cache.rows).reshape(cache.frames, -1), atol=1e-5)
    with Image.open(next(logs.rglob("sprite.png"))) as sprite:
        assert sprite.width == 32 * np.ceil(np.sqrt(cache.frames))


def test_a_column_of_a_name_of_ours_is_another_colour(tmp_path, make_clip, write_cache):
    names = ("video", "own_video", "time in its video", "speed")
    columns = {name: np.full(9, number, float) for number, name in enumerate(names)}
    clips = [make_clip(f"/v/{name}.mp4", 9, **columns) for name in "ab"]
    folder = write_cache(tmp_path / "cache", clips, columns=dict.fromkeys(names, Column("float64")))
    colours = map_of(folder)["colours"]
    assert list(colours) == [
        "time in its video", "video", "own_own_video", "own_video", "own_time in its video", "speed"
    ]  # fmt: skip
    assert [*colours["video"]] == [0] * 9 + [1] * 9
    assert [values[0] for values in colours.values()][2:] == [0, 1, 2, 3]


def test_one_number_or_one_moment_has_its_place_on_the_map(world, tmp_path):
    assert project(np.ones((1, 4)), "pca")[0].shape == (1, 2)
    np.testing.assert_allclose(np.ptp(project(np.array([[-1.0], [0.0], [1.0]]), "pca")[0], axis=0), [2, 0])
    assert "--runs names no folder" in refusal("write_report", f"--runs --output-dir {tmp_path}/none")


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")  # which the map takes nothing from
def test_by_umap_neighbours_lie_together(world, tmp_path, monkeypatch):
    draws = np.random.default_rng(0)
    near = np.repeat(np.arange(3), 30)
    flat = 5 * draws.normal(size=(3, 20))[near] + draws.normal(size=(90, 20))
    places, said = project(flat, "umap")
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    alike = near[:, None] == near
    assert distances[alike].max() < distances[~alike].min()
    assert "UMAP" in said
    assert np.array_equal(project(flat, "umap")[0], places)
    call("write_report", f"--runs {world}/evaluation --rerun --output-dir {tmp_path}/recorded")
    assert {"report.html", "report.rrd"} < {path.name for path in (tmp_path / "recorded").iterdir()}
    with pytest.raises(UserError, match="--map umap takes 5 moments, and there are 4: take --map pca"):
        project(flat[:4], "umap")
    monkeypatch.setitem(sys.modules, "umap.umap_", None)  # as where another package is called so
    given = f"--runs {world}/evaluation --map umap --output-dir {tmp_path}/report"
    assert "--map umap takes umap-learn: pip install 'video-jepa[umap]'" in refusal("write_report", given)


def test_a_recording_has_films_with_their_timelines(tmp_path, encode_video, monkeypatch):
    shown_s = shown_at(0)
    encode_video(tmp_path / "seen.mp4", shown_s)
    film = base64.b64encode(make_film(tmp_path / "seen.mp4", fps=8, offsets_s=(0.0,))).decode()
    moments = {"time_s": [0.5, 0.625], "energy": [1.0, 7.0], "percentile": [50.0, 99.0]}
    videos = [{"name": HOSTILE, "film": film, "moments": moments}, {"name": "gone", "film": "", "moments": moments}]
    page = {"surprises": [{"videos": videos}], "dreams": [{"films": [{"video": HOSTILE, "data": film}]}]}
    write_recording(importlib.import_module("rerun"), tmp_path / "report.rrd", page)
    told = subprocess.run(
        [sys.executable, "-m", "rerun", "rrd", "print", "-v", tmp_path / "report.rrd"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    chunks = re.findall(r" with (\d+) rows .+? - /surprise/.+?/(\w+) - data columns", told)
    assert [name for _, name in chunks] == ["film", *["energy", "percentile"] * 2, "film"], told
    assert [int(rows) for rows, _ in chunks][1:] == [2, 2, 2, 2, 1]
    assert int(chunks[0][0]) > 20  # frames that are shown at their times
    monkeypatch.setitem(sys.modules, "rerun", None)
    refused = refusal("write_report", f"--rerun --output-dir {tmp_path}/report")
    assert "--rerun takes rerun-sdk: pip install 'video-jepa[rerun]'" in refused


@pytest.mark.parametrize("spans", [((0.0, np.inf),), ((1.0, 2.0), (1.5, 2.2), (3.0, 3.2))])
def test_a_film_shows_each_frame_of_the_clocks_at_its_own_time(encode_video, tmp_path, read_number, spans):
    times_s = shown_at(7)
    path, clock = encode_video(tmp_path / "phone.mp4", times_s), {"fps": 4, "offsets_s": (0, 0.125)}
    with av.open(io.BytesIO(make_film(path, spans_s=spans, **clock))) as film:
        frames = [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)
        ]
    ticks = [(timed.tick / 4 + timed.clock / 8, timed.time_s) for timed in read_on_clock(path, (32, 80), **clock)]
    spans = ((0.0, 0.25), *spans)  # the beginning is always there
    wanted = {time_s for tick_s, time_s in ticks if any(begin <= tick_s < end for begin, end in spans)}
    assert [round(time_s, 3) for time_s, _ in frames] == sorted(wanted)
    for time_s, pixels in frames:
        assert read_number(pixels.transpose(2, 0, 1)) == np.abs(times_s - time_s).argmin()
        assert np.abs(times_s - time_s).min() < 2e-3


def test_of_a_long_video_what_is_around_its_highest_moments_is_shown(encode_video, tmp_path):
    path = encode_video(tmp_path / "long.mp4", 600, rate=10)
    inputs = {"provenance": {"fps": 10, "image_fps": 25}, "offsets_s": [0]}
    energies = {20.0: 1.0, 2.0: 3.0, 40.0: 2.0}
    whole = film_of(str(path), energies, inputs, length_s=60, most=600 * 7000)
    assert (whole["spans"], whole["said"]) == ([], "")
    part = film_of(str(path), energies, inputs, length_s=60, most=200 * 7000)
    assert part["spans"] == [(0, 7), (35, 45)]
    assert part["said"].startswith("only 5 s around 2 moments")
    with av.open(io.BytesIO(base64.b64decode(part["film"]))) as film:
        shown = [float(frame.pts * frame.time_base) for frame in film.decode(video=0)]
    assert shown == [tick / 10 for tick in range(600) if tick < 70 or 350 <= tick < 450]


def test_of_a_table_only_the_videos_that_are_shown_are_held(tmp_path):
    path = tmp_path / "peaks.csv"
    path.write_text("video,rank,energy\na,1,3.5\nb,1,nan\nb,2,7\na,2,3\n")
    assert read_table(path, ["a"]) == {"a": [{"rank": 1, "energy": 3.5}, {"rank": 2, "energy": 3}]}
    assert read_table(tmp_path / "events.csv", ["a"]) == {}


def test_what_finds_no_room_is_left_out_and_said(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write_report, "MOST_BYTES", 1_000_000)
    call("write_report", f"--runs {world}/surprise --output-dir {tmp_path}/report")
    page = Page(tmp_path / "report" / "report.html")
    assert "video" not in [tag for tag, _ in page.elements]
    assert len(page.data("data-video")[0]["moments"]["time_s"]) > 20
    assert "Film: the page would weigh more than" in "".join(page.text)
    assert "the page would weigh more than" in capsys.readouterr().out


def test_what_cannot_be_shown_is_refused_in_one_line(world, tmp_path):
    to = f"--output-dir {tmp_path}/report"
    assert "holds no finished run of pretrain, train" in refusal("write_report", f"--runs {world} {to}")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("run.json", "metrics.json"):
        (broken / name).write_bytes((world / "evaluation" / name).read_bytes())
    (broken / "rollout.json").write_text('{"predictors": 3}')
    assert "is not as its run left it" in refusal("write_report", f"--runs {broken} {to}")
    for name in ("run.json", "surprise.csv", "peaks.csv"):
        (broken / name).write_bytes((world / "surprise" / name).read_bytes())
    (broken / "metrics.json").write_text('{"events": null, "threshold": null, "videos": 1, "mean_energy": "high"}')
    assert f"--runs {broken} is not as its run left it (TypeError" in refusal("write_report", f"--runs {broken} {to}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_the_page_without_an_error(world, browser, width, scheme):
    browser.errors.clear()
    browser.open(world / "report" / "report.html", width, scheme=scheme)
    drawn = browser.run("""
        for (const plot of document.querySelectorAll('.plot')) {
            plot.scrollIntoView();
            for (let tries = 0; tries < 100 && !plot.querySelector('.trace, .scatterlayer'); tries++)
                await new Promise((done) => setTimeout(done, 50));
        }
        return [...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('.trace').length)""")
    assert min(drawn) > 0
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.title") == "video-jepa report"  # the name is hostile
    assert browser.errors == []


def test_what_is_drawn_is_what_the_files_say(world, browser):
    browser.open(world / "report" / "report.html")
    figures = browser.run("""
        const names = ['.skill', '.timeline', '[aria-label^="Effective rank"]'];
        const lines = names.map((name) => document.querySelector(name).figure.data);
        return lines.map((all) => all.map(({name, x, y}) => [name.replaceAll(' ', '_'), x, y]))""")
    skill, (_, energy, peaks), ranks = figures
    rows, tops = scored(world), read_rows(world / "surprise" / "peaks.csv")
    assert energy[1:] == [[float(row[name]) for row in rows] for name in ("time_s", "energy")]
    assert peaks[1:] == [[float(row[name]) for row in tops] for name in ("time_s", "energy")]
    curve = [json.loads(line) for line in (world / "encoder" / "curve.jsonl").read_text().splitlines()]
    assert {name for name in curve[0] if name.endswith("_rank")} == {name for name, *_ in ranks}
    for name, *line in ranks:
        assert line == [[entry["step"] for entry in curve], [entry[name] for entry in curve]]
    forecasts = read_json(world / "evaluation" / "rollout.json")["predictors"]
    assert [name for name, *_ in skill[::2]] == list(forecasts)
    for line, band, records in zip(skill[::2], skill[1::2], forecasts.values(), strict=True):
        assert line[2] == [record["relative_to_copy_last"] for record in records]
        low, high = ([record[f"relative_to_copy_last_{end}"] for record in records] for end in ("low", "high"))
        assert band[2] == high + low[::-1]


def test_a_film_is_scrubbed_by_keys(world, browser):
    browser.errors.clear()
    browser.open(world / "report" / "report.html")
    browser.run("document.querySelector('.dream input').focus()")
    for key, code, place in (("Home", 36, 0), ("ArrowRight", 39, 1), ("End", 35, 6), ("ArrowLeft", 37, 5)):
        browser.press(key, code)
        assert browser.run("return document.querySelector('.dream input').value") == str(place)
        time_s = read_json(world / "imagined" / "imagined.json")["films"][0]["times_s"][place]
        said = browser.run("return document.querySelector('.dream .now').textContent")
        assert said.startswith(f"{time_s:.2f} s: {'watching' if place < 3 else 'imagined'}")
        at_s = browser.run("return document.querySelector('.dream video').currentTime")
        assert at_s == pytest.approx((place + 0.5) / 8)
    browser.run("document.querySelector('.map input').focus()")
    browser.press("ArrowRight", 39)
    time_s = EmbeddingCache(world / "cache" / "test").take(np.array([1]), "times_s")[0]
    assert browser.run("return document.querySelector('.map .now').textContent").endswith(f"at {time_s:.2f} s")
    assert browser.errors == []


SEEN = """
    const video = document.querySelector('.video video'), canvas = document.createElement('canvas');
    for (let tries = 0; tries < 200 && (video.seeking || video.readyState < 2); tries++)
        await new Promise((done) => setTimeout(done, 25));
    await new Promise((done) => setTimeout(done, 60));
    canvas.width = 80; canvas.height = 32;
    const brush = canvas.getContext('2d');
    brush.drawImage(video, 0, 0, 80, 32);
    const pixels = brush.getImageData(0, 0, 80, 32).data;
    let number = 0;
    for (let bit = 0; bit < 10; bit++) number += (pixels[4 * (16 * 80 + 8 * bit + 4)] > 128) << bit;
    return number"""
"""The number that the frame on the screen carries."""


def test_clicks_and_keys_show_the_frame_of_their_time(world, browser):
    browser.errors.clear()
    browser.open(world / "report" / "report.html")
    times_s = shown_at(4)
    rows = scored(world)

    def is_shown(time_s):
        assert browser.run(SEEN) == np.abs(times_s - float(time_s)).argmin()

    is_shown(max(rows, key=lambda row: float(row["energy"]))["time_s"])  # where the page opens
    jumps = browser.run("return [...document.querySelectorAll('[data-jump]')].map((one) => one.dataset.jump)")
    assert len(jumps) > 3
    for number, jump in enumerate(jumps):
        browser.run(f"document.querySelectorAll('[data-jump]')[{number}].click()")
        is_shown(jump)
        assert browser.run("return document.querySelector('.video .now').textContent").startswith(f"{float(jump):.2f}")
    cell = next(row for row in rows if row["time_s"] == jumps[-1])
    style = browser.run("const one = document.querySelector('i.cell').style; return [one.top, one.left, one.width]")
    assert style == [f"{50 * int(cell['row'])}%", f"{25 * int(cell['column'])}%", "25%"]
    reddest = browser.run("""
        const canvas = document.querySelector('.screen canvas'), {width, height} = canvas;
        const {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
        const shown = data.filter((_, place) => place % 4 === 3);
        return shown.indexOf(Math.max(...shown))""")
    assert divmod(reddest, 4) == (int(cell["row"]), int(cell["column"]))
    browser.run("document.querySelector('.timeline').focus({preventScroll: false})")
    place = [row["time_s"] for row in rows].index(jumps[-1])
    for key, step in (("ArrowLeft", -1), ("ArrowLeft", -2), ("ArrowRight", -1)):
        browser.press(key)
        is_shown(rows[place + step]["time_s"])
    x, y = browser.run("""
        const plot = document.querySelector('.timeline');
        plot.scrollIntoView({block: 'center'});
        while (!plot.querySelector('.scatterlayer')) await new Promise((done) => setTimeout(done, 50));
        const area = plot.querySelector('.nsewdrag').getBoundingClientRect();
        return [area.left + area.width * 0.5, area.top + area.height * 0.4]""")
    browser.click(x, y)
    middle = (float(rows[0]["time_s"]) + float(rows[-1]["time_s"])) / 2
    is_shown(min((float(row["time_s"]) for row in rows), key=lambda time_s: abs(time_s - middle)))
    browser.run(f"""
        document.querySelector('.video .play').click();
        const video = document.querySelector('.video video');
        for (let tries = 0; tries < 400 && !(video.currentTime > {middle + 0.2}); tries++)
            await new Promise((done) => setTimeout(done, 25));""")
    assert browser.run("return document.querySelector('.video video').currentTime") > middle + 0.2
    assert browser.errors == []
