"""GenEval's rules on detections: official correctness, strict correctness, the continuous reward, task scores.

The metadata of a prompt list groups of objects in `include` (class, count, optional colour, optional position relative
to an earlier group), and counts that must not be reached in `exclude`. The rules:
- official (`correct`): at least the requested count, judged on the most confident detections, and nothing excluded;
- reward: the mean of one to three terms per group: exact count, colours, position. A count term is negative if more
  than twice the requested objects are found. `exclude` is ignored;
- strict: the reward's rule met exactly, and no other detections in the image.

Source: `evaluate` of the GenEval benchmark; the reward of the reward server that BLIP3o-NEXT trains with.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from blip3o_jax.detection import Detection, Thresholds, relative_position
from blip3o_jax.errors import require, type_of
from blip3o_jax.evals.statistics import bootstrap_mean, wilson

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MAX_OBJECTS = 16  # of one class

Groups = Mapping[str, Sequence[Detection]]
"""Class -> detections by falling confidence."""
_JUDGED = {"include": {"class", "count", "color", "position"}, "exclude": {"class", "count"}}  # keys of a clause

OFFICIAL_THRESHOLDS = Thresholds(counting=0.9, others=0.3)
"""The benchmark's thresholds for Mask2Former."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The results of all rules for one image."""

    correct: bool
    strict: bool
    reward: float  # at most 1
    reason: str  # why it is not correct, one clause per line; empty if it is


def group(detections: Iterable[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Groups detections above a threshold by class, at most MAX_OBJECTS of a class, by falling confidence."""
    groups: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            groups.setdefault(detection.label, []).append(detection)
    return {label: found[:MAX_OBJECTS] for label, found in groups.items()}


def _misplaced(found: Sequence[Detection], targets: Sequence[Detection], relation: str) -> str | None:
    """Returns the position of the first detection that is not in `relation` to all `targets`; None if all are."""
    for detection in found:
        for target in targets:
            actual = relative_position(detection.box, target.box)
            if relation not in actual:
                return " and ".join(sorted(actual)) or "in no clear direction"
    return None


def correct(groups: Groups, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Applies the official rule to the result of `group`, by metadata in GenEval's schema.

    Returns:
      Whether the image is correct, and the reasons if not, one per line.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        label, count = clause["class"], clause["count"]
        found = groups.get(label, [])[:count]
        problem = None
        if len(found) < count:
            problem = f"expected {label}>={count}, found {len(found)}"
        elif "color" in clause and sum(d.color == clause["color"] for d in found) < count:
            seen = ", ".join(d.color or "unknown" for d in found)
            problem = f"expected {clause['color']} {label}>={count}, found {seen}"
        elif "position" in clause:
            relation, target = clause["position"]
            if matched[target] is None:
                problem = f"no target for {label} to be {relation}"
            elif (actual := _misplaced(found, matched[target], relation)) is not None:
                problem = f"expected {label} {relation} target, found it {actual}"
        if problem:
            reasons.append(problem)
        matched.append(None if problem else found)
    for clause in metadata.get("exclude", []):
        found = groups.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(found)}")
    return not reasons, "\n".join(reasons)


def reward(groups: Groups, metadata: Mapping[str, Any]) -> tuple[float, bool]:
    """Computes the continuous reward; arguments as for `correct`.

    Returns:
      The mean of all terms, at most 1, and whether every count, colour and position is exact.
    """
    terms: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        label, count = clause["class"], clause["count"]
        found = groups.get(label, [])
        exact = len(found) == count
        terms.append(1 - abs(count - len(found)) / count)
        if not exact and ("color" in clause or "position" in clause):
            terms.append(0.0)
        if exact and "color" in clause:
            right = sum(d.color == clause["color"] for d in found)
            terms.append(1 - (count - right) / count)
            exact = right == count
        if exact and "position" in clause:
            relation, target = clause["position"]
            exact = matched[target] is not None and _misplaced(found, matched[target], relation) is None
            terms += [] if exact else [0.0]
            terms += [1.0] if matched[target] is not None else []
        matched.append(found if exact else None)
    return (sum(terms) / len(terms) if terms else 0.0), None not in matched


def judge(detections: Sequence[Detection], metadata: Mapping[str, Any], thresholds: Thresholds) -> Verdict:
    """Applies all rules to one image; see `check_metadata`.

    `detections` are all of them, including those below the threshold, any of which makes `strict` fail. Raises
    UserError if they are not a list of Detection.
    """
    good = isinstance(detections, Sequence) and all(isinstance(found, Detection) for found in detections)
    require(good, "detector", repr(detections)[:100], "a list of blip3o_jax.detection.Detection", "return one")
    groups = group(detections, thresholds.of(metadata["tag"]))
    is_correct, reason = correct(groups, metadata)
    grade, exact = reward(groups, metadata)
    requested = sum(clause["count"] for clause in metadata["include"])
    return Verdict(is_correct, exact and len(detections) == requested, grade, reason)


def check_metadata(metadata: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a missing or wrong field of GenEval's schema; `where`, such as file and line, is named."""
    problem = _problem(metadata)
    require(not problem, f"{where}: GenEval metadata", problem, "GenEval's schema", "correct the line")


def _problem(metadata: Mapping[str, Any]) -> str | None:
    if not isinstance(metadata, Mapping):
        return type_of(metadata)
    if missing := [key for key in ("tag", "include", "prompt") if key not in metadata]:
        return f"no {', '.join(missing)}"
    kinds = {"tag": str, "prompt": str, "include": list, "exclude": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(metadata.get(key, kind()), kind)]:
        return f"{wrong[0]} {metadata[wrong[0]]!r}"
    if not metadata["include"]:
        return "an empty include, which asks for nothing"
    for part in ("include", "exclude"):
        for number, clause in enumerate(metadata.get(part, [])):
            if problem := _clause_problem(clause, number, _JUDGED[part]):
                return f"{part}[{number}] {problem}"
    return None


def _clause_problem(clause: Any, number: int, judged: Set[str]) -> str | None:
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return "without a class"
    if unknown := sorted(clause.keys() - judged):
        return f"with {unknown[0]}, which its rules do not judge"
    if not _is_number(clause.get("count")) or clause["count"] < 1:
        return f"with count {clause.get('count')!r}"
    if not isinstance(clause.get("color", ""), str):
        return f"with color {clause['color']!r}"
    if "position" in clause and not _is_position(clause["position"], number):
        return f"with position {clause['position']!r}"
    return None


def _is_position(position: Any, number: int) -> bool:
    return (
        isinstance(position, Sequence)
        and len(position) == 2
        and position[0] in ("left of", "right of", "above", "below")
        and _is_number(position[1])
        and 0 <= position[1] < number
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Score:
    """A fraction of correct images with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    count: int  # images

    def __str__(self) -> str:
        return f"{100 * self.value:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.count}"


def summarize(rows: Iterable[tuple[str, str, bool]]) -> dict[str, Score]:
    """Computes the scores of rows (task, prompt, whether the image is correct).

    Returns:
      Task -> score, in the benchmark's order with other tasks last, and "overall", their mean. Intervals of tasks are
      Wilson intervals over prompts; that of the overall score is a bootstrap over prompts within tasks.

    Raises:
      UserError: there are no images.
    """
    tasks: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for task, prompt, right in rows:
        tasks[task][prompt].append(float(right))
    require(tasks, "scores", "no images", "at least one", "check the folder")
    scores = {}
    for task in [*(t for t in TASKS if t in tasks), *(t for t in tasks if t not in TASKS)]:
        results = [right for prompt in tasks[task].values() for right in prompt]
        share = sum(results) / len(results)
        scores[task] = Score(share, *wilson(share * len(tasks[task]), len(tasks[task])), len(results))
    overall = sum(score.value for score in scores.values()) / len(scores)
    spread = bootstrap_mean({task: list(prompts.values()) for task, prompts in tasks.items()})
    scores["overall"] = Score(overall, *spread, sum(score.count for score in scores.values()))
    return scores
