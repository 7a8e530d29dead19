"""Results of the coverage tool: read, counted, shown, and packed into one small file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DEAD = "nothing reads the result"  # so it is in no compiled program: not counted


def read(out: Path, since: int = 0) -> list[dict[str, Any]]:
    """The last line of each model, leaving out the first lines of the file."""
    if not out.exists():
        return []
    return list({o["model"]: o for o in map(json.loads, out.read_text().splitlines()[since:])}.values())


def general(fate: str) -> str:
    """A reason without the names and numbers of one graph."""
    if fate.startswith("capture:"):
        return "torch.compile itself cannot trace the model"
    fate = re.sub(r"\b[a-z_]+(_\d+)+\b|\b\d+\b", "N", fate)
    return fate if len(fate) < 140 else fate[:137] + "..."


def summary(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the models of one source."""
    ran = [o for o in outcomes if o["status"] == "run"]
    everything = [site | {"model": o["model"]} for o in ran for site in o["sites"] if site["fate"] != DEAD]
    sites = [site for site in everything if not site["learned"]]  # scored by queries and keys, not by a layer's weights
    learned = [site for site in everything if site["learned"]]
    missed: dict[str, dict[str, Any]] = {}
    for site in sites:
        if site["fate"] != "replaced":
            entry = missed.setdefault(general(site["fate"]), {"sites": 0, "models": []})
            entry["sites"] += 1
            if site["model"] not in entry["models"]:
                entry["models"].append(site["model"])
    return {
        "models": len(ran),
        "with_sites": sum(bool(o["sites"]) for o in ran),
        "sites": len(sites),
        "replaced": sum(site["fate"] == "replaced" for site in sites),
        "learned": len(learned),
        "learned_replaced": sum(site["fate"] == "replaced" for site in learned),
        "dead": sum(site["fate"] == DEAD for o in ran for site in o["sites"]),
        **_fused([o for o in ran if o["inductor"] is not None]),
        "missed": dict(sorted(missed.items(), key=lambda item: -item[1]["sites"])),
        "not_run": {o["model"]: o["error"] for o in outcomes if o["status"] != "run"},
    }


def _fused(counted: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many sites Inductor's matcher fuses in the models that it was ``counted`` in, of how many."""
    sites = [site for o in counted for site in o["sites"] if site["fate"] != DEAD and not site["learned"]]
    fused = sum(o["inductor"] for o in counted) if counted else None
    return {"inductor": fused, "inductor_sites": len(sites), "inductor_models": sum(bool(o["sites"]) for o in counted)}


def beside(packed: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """``packed``, with Inductor's counts of other runs over some of the models, where these saw as many sites."""
    for file in files:
        source = packed["sources"][file.stem]
        for o in read(file):
            entry = source["by_model"].get(o["model"], [None])
            if o["status"] == "run" and o["inductor"] is not None and len(o["sites"]) == entry[0]:
                added, known = _fused([o]), entry[2] is not None
                source["inductor"] = (source["inductor"] or 0) + o["inductor"] - (entry[2] or 0)
                for name in () if known else ("inductor_sites", "inductor_models"):
                    source[name] += added[name]
                entry[2] = o["inductor"]
    return packed | {"inductor_versions": {"torch": _versions()["torch"]}}


def renewed(packed: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """``packed``, with the fates of sites in new runs of some models, where these have as many sites as before.

    What was packed does not tell sites that a layer's weights score from others: their fates are taken not to have changed.
    """
    for file in files:
        source = packed["sources"][file.stem]
        for o in read(file):
            entry = source["by_model"].get(o["model"])
            if o["status"] != "run" or entry is None or len(o["sites"]) != entry[0]:
                continue
            fates = [Counter(general(s["fate"]) for s in o["sites"] if s["learned"] == learned) for learned in (False, True)]
            old = Counter({**entry[3], "replaced": entry[1]}) - fates[1]
            source["replaced"] += fates[0]["replaced"] - old["replaced"]
            _recount(source["missed"], o["model"], old, fates[0])
            entry[1] = sum(each["replaced"] for each in fates)
            entry[3] = dict((fates[0] + fates[1]) - Counter({"replaced": entry[1]}))
        source["missed"] = dict(sorted(source["missed"].items(), key=lambda item: -item[1]["sites"]))
    return packed


def _recount(missed: dict[str, Any], model: str, old: Counter[str], new: Counter[str]) -> None:
    for reason in (old | new).keys() - {"replaced", DEAD}:
        entry = missed.setdefault(reason, {"sites": 0, "models": []})
        entry["sites"] += new[reason] - old[reason]
        entry["models"] = [m for m in entry["models"] if m != model] + ([model] if new[reason] else [])
        if not entry["sites"]:
            del missed[reason]


def show(files: Sequence[Path]) -> str:
    lines = []
    for file in files:
        s = summary(read(file))
        share = 100 * s["replaced"] / max(1, s["sites"])
        beside = "" if s["inductor"] is None else f", Inductor {s['inductor']} of {s['inductor_sites']}"
        lines.append(
            f"{file.stem}: {s['models']} models ({s['with_sites']} with attention), {s['sites']} sites,"
            f" {s['replaced']} replaced ({share:.1f} %){beside}; {s['learned']} more scored by weights,"
            f" {s['learned_replaced']} of them replaced; {len(s['not_run'])} not run"
        )
        for reason, entry in s["missed"].items():
            examples = ", ".join(entry["models"][:4])
            lines.append(f"  {entry['sites']:5} sites {len(entry['models']):4} models  {reason}  ({examples})")
    return "\n".join(lines)


def pack(files: Sequence[Path]) -> dict[str, Any]:
    """What is kept of several runs: counts by source; of each model sites, replaced, fused by Inductor, and reasons."""
    packed: dict[str, Any] = {"versions": _versions(), "sources": {}}
    for file in files:
        outcomes = read(file)
        models = {}
        for o in sorted(outcomes, key=lambda o: o["model"]):
            if o["status"] == "run" and o["sites"]:
                reasons = dict(Counter(general(s["fate"]) for s in o["sites"] if s["fate"] != "replaced"))
                replaced = sum(s["fate"] == "replaced" for s in o["sites"])
                models[o["model"]] = [len(o["sites"]), replaced, o["inductor"], reasons]
        packed["sources"][file.stem] = summary(outcomes) | {"by_model": models}
    return packed


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "timm", "diffusers", "x-transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
