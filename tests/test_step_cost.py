"""The meter of a step's cost: its counts on a small scenario against formulas, and what each switch saves."""

import sys

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import step_cost  # noqa: E402

SMALL = step_cost.Scenario(generations=4, image_tokens=12, sampled=(5, 7))


@pytest.fixture(scope="module")
def recorded():
    return {name: step_cost.record_step(SMALL, name == "ours") for name in ("plain", "ours")}


def of(calls, part, kind="text"):
    return [call.shape for call in calls if (call.part, call.kind) == (part, kind)]


def test_what_the_plain_path_calls(recorded):
    calls = recorded["plain"]
    images = [patches for shape in (*of(calls, "prefill", "vision"), *of(calls, "reference", "vision"),
                                    *of(calls, "policy", "vision")) for patches in shape]  # fmt: skip
    assert images == [48] * 4 * (1 + 2 + 2 + 2)  # round 1, round 2, reference, policy
    first, second = of(calls, "prefill")
    assert first[0] == second[0] == 4 and first[2] == second[2] == 0 and second[1] > first[1]
    assert len(of(calls, "decode")) == (5 - 1) + (7 - 1)
    assert of(calls, "policy") == of(calls, "reference") == [(4, second[1] + 7, 0)]


def test_what_ours_calls(recorded):
    calls = recorded["ours"]
    images = [patches for call in calls if call.kind == "vision" for patches in call.shape]
    assert images == [48] * (1 + 4)  # the view once, each crop once
    first, second = of(calls, "prefill")
    assert (
        first[0] == 1 and second[0] == 4 and second[2] == first[1] + 5 - 1
    )  # all but the last sampled token is cached
    (spans,) = of(calls, "policy")
    completion = 5 + (second[1] - 1) + 7
    assert spans == ((first[1], 0), *[(completion, first[1])] * 4) and of(calls, "reference") == [spans]
    heads = {call.part: call.shape[0] for call in calls if call.kind == "head"}
    assert heads == {"reference": 48, "policy": 48, "generation": 48}


def test_the_counter_agrees_with_the_formula():
    """A dense forward pass of one row: the weights of the layers, and every query with every key."""
    replay = step_cost.Replay("7b")
    call = step_cost.Call("reference", "text", False, (1, 100, 0))
    h, inner, kv = 3584, 18944, 512
    expected = 28 * (2 * 100 * (2 * h * h + 2 * h * kv + 3 * h * inner) + 4 * h * 100 * 100)
    assert replay.flops(call, True) == {"reference": pytest.approx(expected, rel=1e-3)}
    with_grad = replay.flops(step_cost.Call("policy", "text", True, (1, 100, 0)), True)
    assert with_grad["recompute"] == with_grad["policy forward"] == pytest.approx(expected, rel=1e-3)
    assert 0.9 * expected < with_grad["backward"] < 1.2 * expected  # frozen weights: activations alone
    cached = replay.flops(step_cost.Call("decode", "text", False, (2, 1, 500)), True)["decode"]
    assert cached == pytest.approx(28 * 2 * (2 * (2 * h * h + 2 * h * kv + 3 * h * inner) + 4 * h * 501), rel=1e-3)


def test_decoding_steps_are_summed_exactly():
    replay = step_cost.Replay("3b")
    calls = [step_cost.Call("decode", "text", False, (2, 1, cached)) for cached in (50, 51, 52, 53)]
    one_by_one = sum(replay.flops(call, True)["decode"] for call in calls)
    assert step_cost.total(calls, replay, True)["decode"] == pytest.approx(one_by_one)


def test_ours_is_near_the_floor_and_below_plain(recorded):
    replay = step_cost.Replay("7b")
    prompt, reply = step_cost.text_tokens(recorded["ours"], SMALL)
    sums = {name: sum(step_cost.total(calls, replay, True).values()) for name, calls in recorded.items()}
    least = sum(step_cost.floor(SMALL, "7b", prompt, reply).values())
    assert least <= 1.02 * sums["ours"] and sums["ours"] < 1.15 * least and sums["ours"] < 0.8 * sums["plain"]
    peaks = {name: step_cost.peak_bytes(calls, replay, True) for name, calls in recorded.items()}
    assert 0 < peaks["ours"] <= peaks["plain"]
