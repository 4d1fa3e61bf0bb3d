"""States a second of the explorer on the trylock model, whose state counts are known from SPIN.

    python benchmarks/explore.py [--rounds 3] [--repeat 5]

Prints, for the hashed and the exact mode, states, transitions, states and transitions a second (best of the repeats),
how often model code ran, and the rate of a plain successor function over tuples on the same model for comparison.
"""

from __future__ import annotations

import argparse
import time

from septum.core.explore import Bounds
from septum.lab.recording import explore
from septum.lab.scenario import find_scenario

COUNTS = {1: 4_027, 2: 84_640, 3: 612_724, 4: 2_687_125}


def plain_search(rounds: int, retry: int = 3, vcpus: int = 3) -> tuple[int, float]:
    """The model written by hand as a successor function over flat tuples, searched breadth-first."""
    start = (0, 0, 0) + (0, 0, 0, 0, 0) * vcpus  # two locks, counter; per vcpu: place, tries, round, won, reg
    begin = time.perf_counter()
    seen = {start}
    todo = [start]
    for state in todo:
        for vcpu in range(vcpus):
            at = 3 + 5 * vcpu
            place, tries, done, won, reg = state[at : at + 5]
            if place == 7:
                continue
            s = list(state)
            first, second = vcpu % 2, 1 - vcpu % 2
            gave_up = back = False
            if place == 0:
                if not s[first]:
                    s[first], place = vcpu + 1, 1
                elif tries < retry:
                    tries += 1
                else:
                    gave_up = True
            elif place == 1:
                place = 6 if s[second] else 2
                s[second] = s[second] or vcpu + 1
            elif place == 2:
                reg, place = s[2], 3
            elif place == 3:
                s[2], won, reg, place = reg + 1, won + 1, 0, 4
            elif place == 4:
                s[second], place = 0, 5
            elif place == 5:
                s[first], gave_up, back = 0, True, True
            else:
                s[first] = 0
                if tries < retry:
                    tries, place = tries + 1, 0
                else:
                    gave_up = back = True
            if gave_up:
                tries, done = 0, done + 1
                place = 7 if done == rounds else 0 if back else place
            s[at : at + 5] = place, tries, done, won, reg
            after = tuple(s)
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return len(seen), time.perf_counter() - begin


def main() -> None:
    """Runs the benchmark and prints one line per engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, choices=sorted(COUNTS))
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    scenario = find_scenario("trylock")
    values = scenario.values([f"rounds={options.rounds}"])
    rates = {}
    for mode in ("hashed", "exact"):
        runs = [explore(scenario, values, Bounds(), exact=mode == "exact") for _ in range(options.repeat)]
        best = min(runs, key=lambda verdict: verdict.seconds)
        assert best.states == COUNTS[options.rounds], "the explorer lost or made up states"
        rates[mode] = best.states / best.seconds
        print(
            f"{mode:<8} {best.states:>9,} states {best.transitions:>9,} transitions {best.seconds:6.2f} s"
            f" {rates[mode]:>9,.0f} states/s {best.transitions / best.seconds:>9,.0f} transitions/s"
            f"  (model code ran {best.runs:,} times)"
        )
    seconds = []
    for _ in range(options.repeat):
        states, taken = plain_search(options.rounds)
        assert states == COUNTS[options.rounds]
        seconds.append(taken)
    plain = COUNTS[options.rounds] / min(seconds)
    print(f"{'by hand':<8} {COUNTS[options.rounds]:>9,} states {min(seconds):31.2f} s {plain:>9,.0f} states/s")
    print(f"ratio to by hand: hashed {rates['hashed'] / plain:.1f}, exact {rates['exact'] / plain:.1f}")


if __name__ == "__main__":
    main()
