"""Watching: what is recorded now is scored as it would be afterwards, whatever becomes of the source meanwhile."""

import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler

import av
import numpy as np
import psutil
import pytest
import torch

from data.errors import VideoError
from jepa.networks import TransformerConfig
from pipelines import cache_embeddings, calibrate, score_surprise, train_predictor, watch
from pipelines.run.command import UserError
from tests.conftest import add_sound, read_rows, save_encoder

RATE, SECONDS = 8, 12


def walk(seed, event=False):
    """A square that goes round; in the event another one stands there for a while."""
    start, pictures = np.random.default_rng(seed).integers(0, 48), []
    for number in range(RATE * SECONDS):
        picture = np.full((32, 48, 3), 40, np.uint8)
        column = (start + 2 * number) % 48
        picture[20:28, column : column + 8] = 200
        if event and 6 <= number / RATE < 7.5:
            picture[2:14, 30:44] = 250
        pictures.append(picture)
    return pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory, encode_video):
    """A run of surprise with alarms, by a grid of tokens on two clocks; the video that it scored has an event."""
    folder = tmp_path_factory.mktemp("watched")
    torch.manual_seed(0)
    save_encoder(folder / "encoder", image_size=(32, 48), grid=(4, 6), embedding_dimension=6)
    for first, (split, videos) in enumerate({"train": 6, "val": 4, "normal": 4, "test": 1}.items()):
        (folder / split).mkdir()
        for number in range(videos):
            pictures = walk(100 * first + number, event=split == "test")
            encode_video(folder / split / f"{number}.mkv", len(pictures), pictures, rate=RATE, options={"g": "8"})
        cache_embeddings.main(
            cache_embeddings.Options(
                videos=(folder / split,), encoder=str(folder / "encoder"), output_dir=folder / "cache" / split,
                fps=4.0, clocks=2,
            )
        )  # fmt: skip
    train_predictor.main(
        train_predictor.Options(
            train_cache=folder / "cache/train", validation_cache=folder / "cache/val", output_dir=folder / "predictor",
            steps=30, batch_size=32, rollout_steps=2, validation_horizon=3, tracker=("none",),
            predictor=TransformerConfig(context=4, width=16, depth=1, heads=2),
        )
    )  # fmt: skip
    score_surprise.main(
        score_surprise.Options(
            cache=folder / "cache/test", predictor=folder / "predictor", normal=folder / "cache/normal",
            alarms_per_hour=100, horizons=(1, 2, 3), smoothing=0.25, output_dir=folder / "surprise",
        )
    )  # fmt: skip
    for path in folder.glob("*/*.mkv"):
        os.utime(path, (0, 0))  # nobody writes to them any more
    return folder


@pytest.fixture
def look(world, capsys):
    """Watch a source in this process; the lines that were printed."""

    def look_at(source, give_up_after=1.0):
        capsys.readouterr()
        watch.main(watch.Options(str(source), surprise=world / "surprise", give_up_after=give_up_after))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return look_at


def read_numbers(path):
    return [{name: float(value) for name, value in row.items() if name != "video"} for row in read_rows(path)]


def assert_as_scored(lines, world):
    """Scores and events are those of `surprise`."""
    scored, events = (read_numbers(world / "surprise" / name) for name in ("surprise.csv", "events.csv"))
    assert len(lines) == len(scored) > 60
    for line, row in zip(lines, scored, strict=True):
        row = {name: value for name, value in row.items() if name not in ("copying", "mahalanobis", "difference")}
        assert {name: line[name] for name in row} == pytest.approx(row, abs=1e-3, rel=1e-4)
    alarms = {line["alarm"]["begin_s"]: line["alarm"] for line in lines if line["alarm"]}
    assert len(events) > 0
    for alarm, event in zip(alarms.values(), events, strict=True):
        assert alarm == pytest.approx(event, abs=1e-3, rel=1e-4)
        assert 5 < alarm["peak_s"] < 8


def test_a_replayed_file_has_the_scores_and_the_events_of_surprise(world, look):
    lines = look(world / "test" / "0.mkv")
    assert_as_scored(lines, world)
    assert all(0 <= line["latency_s"] < 10 for line in lines)
    assert lines[0]["alarm"] is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grows.mkv", {}),
        ("grows.ts", {}),
        ("grows.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("whole.mp4", {}),  # its index comes last: it can be read once it is whole
    ],
)
def test_a_file_is_watched_while_it_is_written(world, tmp_path, encode_video, look, name, options):
    pictures = walk(300, event=True)
    whole = tmp_path / f"all_{name}"
    encode_video(whole, len(pictures), pictures, rate=RATE, options={"g": "8"}, container_options=options)
    content, path = whole.read_bytes(), tmp_path / name
    path.touch()

    def write():
        with path.open("ab", buffering=0) as file:
            for part in range(20):
                file.write(content[len(content) * part // 20 : len(content) * (part + 1) // 20])
                time.sleep(0.1)

    writer = threading.Thread(target=write)
    writer.start()
    lines = look(path)
    writer.join()
    assert_as_scored(lines, world)


class Serve(BaseHTTPRequestHandler):
    """Sends a live stream, of no known length, and breaks off after a share of it."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        content = self.server.content
        self.wfile.write(content[: int(len(content) * self.server.share)])

    def log_message(self, *_):
        pass


class Server(socketserver.TCPServer):
    allow_reuse_address = True

    def __init__(self, content, share, port=0):
        super().__init__(("127.0.0.1", port), Serve)
        self.content, self.share = content, share


@pytest.fixture
def stream(tmp_path, encode_video):
    """The bytes of a transport stream, which has no length."""
    pictures = walk(300, event=True)
    return encode_video(tmp_path / "all.ts", len(pictures), pictures, rate=RATE, options={"g": "8"}).read_bytes()


def test_a_stream_that_comes_back_is_watched_on_and_one_that_does_not_is_given_up(world, stream, look, capsys):
    def serve():
        """Break off after three quarters, be gone for two seconds, come back whole, and go."""
        with Server(stream, 0.75) as server:
            ports.append(server.server_address[1])
            server.handle_request()
        time.sleep(2)
        with Server(stream, 1, ports[0]) as server:
            server.handle_request()

    ports = []
    server = threading.Thread(target=serve)
    server.start()
    while not ports:
        time.sleep(0.01)
    with pytest.raises(VideoError, match=r"http://127.0.0.1:\d+/live.ts: nothing has come for 4 s"):
        look(f"http://user:secret@127.0.0.1:{ports[0]}/live.ts", give_up_after=4)
    server.join()
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert "secret" not in said.err
    assert said.err.count("trying again") == 2
    again = int(np.diff([line["time_s"] for line in lines]).argmax()) + 1
    before, after = lines[:again], lines[again:]
    gap_s = after[0]["time_s"] - before[-1]["time_s"]
    assert 1.5 < gap_s < 10  # the past that a forecast takes, and how long the stream was gone
    scored = read_numbers(world / "surprise" / "surprise.csv")
    for part in (before[:-1], after[:-1]):  # where it breaks off, the last frame is the nearest there is
        assert [line["energy"] for line in part] == pytest.approx(
            [row["energy"] for row in scored[: len(part)]], abs=1e-3, rel=1e-4
        )
    assert len(scored) * 0.6 < len(before) < len(scored) - 2 <= len(after)


def start(world, source, *options):
    command = [sys.executable, "-m", "pipelines.cli", "watch", str(source), "--surprise", str(world / "surprise")]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_with_a_summary(world, tmp_path):
    path = tmp_path / "grows.mkv"
    path.write_bytes((world / "test" / "0.mkv").read_bytes())
    with start(world, path, "--give-up-after", "600") as process:
        lines = [json.loads(process.stdout.readline())]
        while not lines[-1]["alarm"]:
            lines.append(json.loads(process.stdout.readline()))
        time.sleep(1)  # it waits for more
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    lines += map(json.loads, out.splitlines())
    said = f"grows.mkv: {len(lines)} moments scored, the last at {lines[-1]['time_s']:.2f} s; 1 alarm"
    assert err.strip().endswith(said)


def repeat(path, times, output):
    """A video again and again, as one recording."""
    with av.open(str(path)) as source, av.open(str(output), "w") as target:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        stream = target.add_stream_from_template(source.streams.video[0])
        stamps = [packet.pts for packet in packets]
        for turn in range(times):
            for packet, stamp in zip(packets, stamps, strict=True):
                packet.pts = packet.dts = stamp + int(turn * SECONDS / packet.time_base)
                packet.stream = stream
                target.mux(packet)
    os.utime(output, (0, 0))


def test_memory_stays_flat(world, tmp_path, encode_video):
    pictures = walk(300, event=True)
    video = encode_video(tmp_path / "v.mkv", len(pictures), pictures, rate=RATE, options={"g": "8", "bf": "0"})
    repeat(video, 15, tmp_path / "long.mkv")  # three minutes
    process, sizes = start(world, tmp_path / "long.mkv"), []
    with process:
        lines = 0
        for lines, _ in enumerate(process.stdout, start=1):
            if lines % 200 == 0:
                sizes.append(psutil.Process(process.pid).memory_info().rss / 1e6)
    assert process.returncode == 0
    assert lines > 1400
    assert sizes[-1] - sizes[1] < 10  # MB


def test_what_cannot_be_watched_is_refused_in_a_line(look, tmp_path):
    (tmp_path / "text.mkv").write_text("no video")
    (tmp_path / "empty.ts").touch()
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        add_sound(container, container.add_stream("aac", rate=8000, layout="mono"), 1)
    for source, reason in (
        (tmp_path / "none.mkv", "none.mkv: no such file"),
        (tmp_path, "not a readable video"),
        (tmp_path / "text.mkv", "text.mkv: not a readable video"),
        (tmp_path / "empty.ts", "empty.ts: not a readable video"),
        (tmp_path / "sound.mkv", "there is no video stream in it"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x: not a readable video .Connection refused"),
        ("file:///etc/passwd", "not a readable video"),
        ("odd://x", "not a readable video"),
    ):
        with pytest.raises(VideoError, match=reason):
            look(source, give_up_after=0.3)


def test_a_run_that_cannot_be_watched_by_is_refused(world, tmp_path):
    def watch_by(surprise, **changes):
        watch.main(watch.Options(str(world / "test" / "0.mkv"), surprise=surprise, **changes))

    def changed(name, **options):
        """The run with other options."""
        record = json.loads((world / "surprise" / "run.json").read_text())
        record["options"] |= options
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        (tmp_path / name / "metrics.json").write_text('{"threshold": "high"}')
        return tmp_path / name

    shutil.copytree(world / "predictor", tmp_path / "other")
    calibrate.main(calibrate.Options(tmp_path / "other", world / "cache/normal", horizon=3))
    save_encoder(tmp_path / "encoder", image_size=(32, 48), grid=(4, 6), embedding_dimension=6)
    for options, reason in (
        ({"surprise": tmp_path}, "there is no finished run of surprise here"),
        ({"surprise": world / "predictor"}, "there is no finished run of surprise here"),
        ({"surprise": changed("gone", predictor=str(tmp_path / "gone"))}, "there is no predictor here"),
        ({"surprise": changed("other_run", predictor=str(tmp_path / "other"))}, "scored by another calibration"),
        ({"surprise": changed("mask", ignore_region="none.png")}, "none.png: not a readable picture"),
        ({"surprise": changed("ahead", horizons=3)}, r"--surprise .*ahead is not as its run left it \(TypeError"),
        ({"surprise": changed("loud")}, r"--surprise .*loud is not as its run left it \(ValueError: could not conv"),
        ({"surprise": world / "surprise", "encoder": tmp_path / "none"}, "there is no encoder"),
        ({"surprise": world / "surprise", "encoder": tmp_path / "encoder"}, "give that one as --encoder"),
    ):
        with pytest.raises((UserError, VideoError), match=reason):
            watch_by(**options)
