"""Placement, plan and drawings."""

import json
import threading
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Literal

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import Lane, StageKind
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.layout import lay_out
from stageflow.pipeline.placement import place, shippable, shipped_bytes
from stageflow.pipeline.policies import RetryConfig

LOCK = threading.Lock()
SVG = "{http://www.w3.org/2000/svg}"


def noop():
    return None


def gen():
    yield 1


def take(x):
    return x


async def wait(x):
    return x


def uses_lock(x):
    return LOCK


class Holder:
    def __init__(self):
        self.connection = {"lock": threading.Lock()}

    def execute(self, ctx): ...


def lane_of(runner, **keywords) -> tuple[str, str]:
    config = {key: keywords.pop(key) for key in ("overrides", "lane") if key in keywords}
    placed = place(PipelineBuilder("p").stage("s", runner, **keywords).build().specs[0], **config)
    return str(placed.lane), placed.why


@pytest.mark.parametrize(
    ("expected", "runner", "keywords"),
    [
        ("async", wait, {}),
        ("async", wait, {"kind": "transform"}),
        ("process", wait, {"executor": "process"}),
        ("async", noop, {"kind": "route"}),
        ("process", noop, {"kind": "transform"}),
        ("process", lambda x: x, {"kind": "transform"}),
        ("thread", noop, {}),
        ("thread", noop, {"kind": "guard"}),
        ("thread", noop, {"kind": "agent"}),
        ("thread", noop, {"kind": "enrich"}),
        ("process", noop, {"overrides": {"work": "process"}}),
        ("process", noop, {"overrides": {StageKind.WORK: Lane.PROCESS}}),
        ("thread", noop, {"overrides": {"work": "process"}, "executor": "thread"}),
        ("inline", wait, {"lane": "inline", "executor": "process"}),
        ("thread", Holder(), {"kind": "transform"}),
    ],
)
def test_placement(expected, runner, keywords):
    lane, why = lane_of(runner, **keywords)
    assert lane == expected
    assert why


def test_what_cannot_be_sent_is_named():
    def closes_over(x, lock=LOCK):
        return lock

    assert shippable(noop) is None
    assert shippable(len) is None
    assert shippable(lambda x: x) is None
    assert shipped_bytes(lambda x: x) > 0
    assert "connection" in shippable(Holder())
    assert "['lock']" in shippable(Holder())
    assert "default 1" in shippable(closes_over)
    assert "cannot be sent" in lane_of(closes_over, kind="transform")[1]


def test_an_unknown_lane_or_format_is_named():
    with pytest.raises(DefinitionError, match="Did you mean 'thread'"):
        lane_of(noop, lane="thred")
    with pytest.raises(DefinitionError, match="Did you mean 'svg'"):
        PipelineBuilder("p").stage("s", noop).build().draw("svgg")


def planned():
    def choose(index) -> Literal["a", "b", "c"]: ...

    def end(a, b=None, never=1): ...

    builder = PipelineBuilder("p").stage("src", gen).map("m", take, "src", retry=RetryConfig(5), rate="9/min")
    builder.reduce("index", lambda acc, item: acc, "m").stage("all", lambda m: m, spill=False)
    return builder.branch(("choose", choose), {"a": take, "b": take}, ("end", end), "index").build()


def test_a_plan_says_what_a_reader_could_not_guess():
    plan = planned().plan({"placement": {"work": "inline"}, "memory_limit": "2GiB"})
    assert plan.stage("m").lane == "process"
    assert plan.stage("all").lane == "inline"
    assert plan.stage("m").policies == {"retry": "RetryConfig(max_attempts=5)", "rate": "9/min"}
    assert plan.stage("all").waits_for_all_of == ("m",)
    assert plan.unrouted == {"choose": ("c",)}
    absent = {b.param: b.may_be_absent for b in plan.stage("end").bindings}
    assert absent == {"a": "the stage is skipped (input_absent: a)", "b": "its default", "never": None}
    assert any("spill=False" in line for line in plan.bounds)
    assert any("2GiB" in line for line in plan.bounds)
    assert plan.optional_inputs == {"never": "any"}
    text = plan.to_text()
    for part in ("(by name alone)", "may be absent", "m: rate 9/min", "map over src", "after choose"):
        assert part in text
    assert json.loads(json.dumps(plan.to_dict()))["stages"][1]["name"] == "m"
    with pytest.raises(KeyError):
        plan.stage("nobody")


HOSTILE = 'a "quoted" <b> & \\ `x`; #1 {y} | ] é 中'


def test_names_are_escaped_in_every_format():
    graph = PipelineBuilder(HOSTILE).stage(HOSTILE, noop).stage("end", noop, HOSTILE).build()
    root = ET.fromstring(graph.draw("svg"))
    assert HOSTILE in [node.text for node in root.iter(f"{SVG}text")]
    dot = graph.draw("dot")
    assert 'a \\"quoted\\" <b> & \\\\ `x`; #1' in dot
    assert dot.replace("\\\\", "").replace('\\"', "").count('"') % 2 == 0
    label = graph.draw("mermaid").splitlines()[1]
    assert label.count('"') == 2
    assert "#quot;quoted#quot; #lt;b#gt; #amp; #92; #96;x#96;#59; #35;1" in label
    assert HOSTILE in graph.draw("text")


def test_every_edge_says_what_it_carries():
    graph = planned()
    assert "s0 ==> s1" in graph.draw("mermaid")
    assert "s1 ==>|all| s3" in graph.draw("mermaid")
    assert "s4 -.-> s5" in graph.draw("mermaid")
    assert "s2 -> s4;" in graph.draw("dot")
    assert "<- m[*]" in graph.draw("text")
    root = ET.fromstring(graph.draw("svg"))
    classes = [path.get("class") for path in root.iter(f"{SVG}path")]
    edges = sum(len(deps) for deps in graph.deps)
    legend = 4
    assert sum(1 for c in classes if c and c.startswith("edge ")) == edges + legend
    assert graph.draw("svg") == graph.draw("svg")


def test_a_picture_has_a_box_per_stage_and_both_colour_schemes():
    graph = PipelineBuilder("p").chain([take] * 60, prefix="s").build()
    svg = graph.draw("svg")
    root = ET.fromstring(svg)
    assert sum(1 for g in root.iter(f"{SVG}g") if (g.get("class") or "").startswith("node ")) == 60
    assert "prefers-color-scheme:dark" in svg
    assert float(root.get("width")) < float(root.get("height"))
    huge = PipelineBuilder("p").chain([take] * 2001, prefix="s").build()
    with pytest.raises(DefinitionError, match="too many"):
        huge.draw("svg")


def test_layout_keeps_boxes_apart_and_chains_straight():
    deps = [[], [0], [1], [2, 0], [0], [4], [5, 3]]
    depth = [0, 1, 2, 3, 1, 2, 4]
    sizes = [40.0] * 7
    layout = lay_out(deps, depth, sizes, sizes, layer_gap=10, box_gap=12, line_gap=6)
    for layer in range(5):
        inside = sorted((b.centre, b.across, b.stage) for b in layout.boxes if b.layer == layer)
        for (low, a, s), (high, b, t) in pairwise(inside):
            least = 12 if s >= 0 and t >= 0 else 6
            assert high - low >= (a + b) / 2 + least - 1e-6
    assert layout.boxes[1].centre == pytest.approx(layout.boxes[2].centre)
    assert layout.routes[0, 3][0] == 0
    assert layout.routes[0, 3][-1] == 3
    assert len(layout.routes[0, 3]) == 4
    assert min(b.centre - b.across / 2 for b in layout.boxes) == pytest.approx(0)


def test_every_format_shows_which_stages_share_a_worker():
    graph = (
        PipelineBuilder("fused", inputs={"xs": list})
        .map("a", lambda x: x, "xs", kind="transform")
        .map("b", lambda x: x, "a", kind="transform")
        .map("c", lambda x: x, "b", kind="transform", fuse=False)
        .build()
    )
    text = graph.draw("text")
    assert "<- a+" in text
    assert "<- b*" in text
    assert "+ element by element in the same worker" in text
    assert "s0 ==>|same worker| s1" in graph.draw("mermaid")
    assert "s1 ==> s2" in graph.draw("mermaid")
    assert 's0 -> s1 [penwidth=5, arrowhead=none, color="#d9622b", tooltip="same worker"]' in graph.draw("dot")
    picture = graph.draw("svg")
    assert picture.count('class="edge fused"') == 2  # the edge, and its line in the legend
    assert "elements, same worker" in picture


def test_the_plan_says_who_drives_a_source():
    def numbers():
        yield 1

    async def on_loop():
        yield 1

    def noted(source, words, **more):
        graph = PipelineBuilder("s").stage("numbers", source, **more).map("m", lambda x: x, "numbers").build()
        return any(words in note for note in graph.plan().stage("numbers").notes)

    assert noted(numbers, "driven by a worker of its own", kind="transform")
    assert not noted(numbers, "driven by")
    assert noted(on_loop, "in no worker", executor="process")
