"""`mobilesam doctor`: gather the facts, judge them, and print them as lines.

A part of the facts needs some packages (`_NEEDS`); it is None where one of these can't be imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..common.errors import counted, shown
from . import machine, packages

_NEEDS = {
    "memory": {"psutil"},
    "torch": {"torch", "numpy", "lazy-loader"},
    "cache": {"platformdirs", "lazy-loader"},
}
"""Packages of the base install that a part of the facts needs; the facts of the folder need all of them."""

LITTLE_DISK = 1_000_000_000
"""Free bytes below which the disk is a problem: a run's checkpoints, and a store of a few hundred images."""


def doctor(phase: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Gather facts about this machine, this installation and the current folder. Nothing is changed or downloaded.

    Args:
        phase: called with the work that begins.

    Returns:
        Plain JSON values; docs/DOCTOR.md describes the keys.
    """
    phase("importing packages")
    base = packages.base_packages()
    broken = {name for name, package in base.items() if package["error"] is not None}

    def part(name: str, gather: Callable[[], Any]) -> Any:
        return None if _NEEDS[name] & broken else gather()

    phase("asking the devices")
    torch = part("torch", _torch_facts) or dict.fromkeys(("torch", "device", "gpus", "driver"))
    facts: dict[str, Any] = {
        "mobilesam": {"version": __version__, "editable": packages.installed_at()},
        "python": machine.python(),
        "system": machine.system(),
        "processor": machine.processor(),
        "memory": part("memory", machine.memory),
        **torch,
        "cache": part("cache", _cache),
        "packages": base,
        "extras": packages.extras(),
        "environment": machine.environment(),
    }
    phase("looking into this folder")
    here: dict[str, Any] = {"path": os.getcwd(), "disk": machine.disk(Path())}
    if base and not broken:
        here |= _contents(here["disk"]["free"], facts)
    else:
        here |= dict.fromkeys(("photos", "stores", "runs", "next"))
    facts["folder"] = here
    facts["problems"] = list(_problems(facts))
    facts["works"] = not any(problem["breaks"] for problem in facts["problems"])
    return facts


def _torch_facts() -> dict[str, Any]:
    from . import devices

    return {
        "torch": devices.torch_build(),
        "device": devices.default_device(),
        "gpus": devices.gpus(),
        "driver": devices.nvidia_driver(),
    }


def _cache() -> dict[str, Any]:
    found = machine.checkpoints()
    return found | {"disk": machine.disk(Path(found["folder"]))}


def _contents(disk_free: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    from . import folder

    found = {"photos": folder.photos(Path()), "stores": folder.stores(Path()), "runs": folder.runs()}
    known = {
        "disk_free": disk_free,
        "memory": facts["memory"]["available"],
        "gpu": bool(facts["gpus"]),
        "cached": [
            file["teacher"] for file in facts["cache"]["files"] if file["teacher"] and file["complete"]
        ],
        "report": facts["extras"].get("report", {"complete": False})["complete"],
    }
    return found | {"next": folder.next_step(found, known)}


# ---- problems


def _problem(fact: str, mend: str, *, breaks: bool = False) -> dict[str, Any]:
    return {"breaks": breaks, "fact": fact, "mend": mend}


def _problems(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from _package_problems(facts)
    if facts["torch"] is not None:
        yield from _gpu_problems(facts["torch"], facts["gpus"], facts["driver"], facts["environment"])
        yield from _thread_problems(facts)
    yield from _core_problems(facts["processor"])
    yield from _disk_problems(facts)
    if facts["folder"]["stores"] is not None:
        yield from _memory_problems(facts["memory"])


def _package_problems(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not facts["packages"]:
        yield _problem(
            "mobilesam is not installed: it runs from a folder of files, and its packages are not known",
            f"in a clone: {packages.pip_install('.')}",
            breaks=True,
        )
    for name, package in facts["packages"].items():
        if package["error"] is None:
            continue
        together = ["torch", "torchvision"] if name in ("torch", "torchvision") else [name]
        wanted = [
            f"{each}{facts['packages'][each]['wanted']}" for each in together if each in facts["packages"]
        ]
        again = [] if package["version"] is None else ["--force-reinstall"]
        yield _problem(
            f"{name} can't be used: {package['error']}", packages.pip_install(*again, *wanted), breaks=True
        )


def _gpu_problems(
    torch: Mapping[str, Any],
    gpus: list[Mapping[str, Any]],
    driver: Mapping[str, Any] | None,
    environment: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and driver["error"] is not None:
        yield _problem(
            f"nvidia-smi fails: {driver['error']}",
            "reload or reinstall NVIDIA's driver, or restart the machine; in a container, start it with its GPUs",
        )
    elif driver is not None and not torch["cuda_usable"]:
        seen = f"nvidia-smi lists {counted(len(driver['gpus']), 'GPU')} ({driver['gpus'][0]})"
        if torch["cuda"] is None and torch["hip"] is None:
            yield _problem(
                f"{seen}, but this torch ({torch['version']}) is built without CUDA, and computes on the CPU",
                "install a torch with CUDA: https://pytorch.org/get-started/locally gives the command",
            )
        elif hidden is not None:
            yield _problem(
                f"{seen}, but CUDA_VISIBLE_DEVICES={hidden!r} leaves none of them to torch",
                "unset CUDA_VISIBLE_DEVICES, or name a GPU: CUDA_VISIBLE_DEVICES=0",
            )
        else:
            why = f": {torch['cuda_warning']}" if torch["cuda_warning"] else ""
            yield _problem(
                f"{seen}, but torch {torch['version']}, for CUDA {torch['cuda']}, can't use CUDA with driver "
                f"{driver['version']}{why}",
                "update NVIDIA's driver, or install a torch for an older CUDA: "
                "https://pytorch.org/get-started/previous-versions",
            )
    for gpu in gpus:
        if gpu["error"] is not None:
            yield _problem(
                f"{gpu['device']} ({gpu['name']}) can't be used: {gpu['error']}",
                "end what else uses it, or choose another one with --device",
            )


def _thread_problems(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    given, threads = facts["environment"].get("OMP_NUM_THREADS"), facts["torch"]["threads"]
    usable = facts["processor"]["usable"]
    # torch's own choice is one for each physical core: half of the logical ones.
    if given is not None and facts["device"]["device"] == "cpu" and 2 * threads < usable:
        yield _problem(
            f"OMP_NUM_THREADS={given} lets distill use {counted(threads, 'thread')} on {usable} cores",
            "unset OMP_NUM_THREADS",
        )


def _core_problems(processor: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    usable, affinity = processor["usable"], processor["affinity"]
    if usable < affinity:
        cores = sorted(os.sched_getaffinity(0))[:usable]
        yield _problem(
            f"{counted(affinity, 'core')} are visible, but a limit of this container or job allows the time of "
            f"{processor['limit']:g}: threads for all of them wait for each other",
            f"start the commands with taskset -c {','.join(map(str, cores))}, as in taskset -c "
            f"{','.join(map(str, cores))} mobilesam distill",
        )


def _memory_problems(memory: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from .folder import training_bytes

    need = training_bytes(1024)
    if memory["available"] < need:
        yield _problem(
            f"only {machine.size_words(memory['available'])} of memory are available; distill takes "
            f"{machine.size_words(need)} for one image of 1024 pixels",
            "end other programs, or work with smaller images: precompute --image-size 512",
        )


def _disk_problems(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    folder = facts["folder"]
    disk = folder["disk"]
    if not disk["writable"]:
        yield _problem(
            f"{shown(folder['path'])} is not writable, and the commands write stores and runs here",
            "change to another folder, or give --out",
        )
    if disk["free"] < LITTLE_DISK:
        yield _problem(
            f"only {machine.size_words(disk['free'])} are free in {shown(folder['path'])}"
            f"{_that_fit(disk['free'], facts)}",
            "free some, work in a folder of another disk, or make smaller stores: --dtype int8, --image-size 512",
        )
    cache = facts["cache"]
    if cache is not None:
        for file in cache["files"]:
            if not file["complete"]:
                yield _problem(
                    f"{file['name']} in {shown(cache['folder'])} is not complete ({file['bytes']:,} bytes)",
                    "a .part is continued by the next command that needs it; remove any other file",
                )
        if not cache["disk"]["writable"]:
            yield _problem(
                f"checkpoints can't be downloaded into {shown(cache['folder'])}: it is not writable",
                "set MOBILESAM_CACHE to a folder that is, or give --checkpoint FILE",
            )


def _that_fit(free: int, facts: Mapping[str, Any]) -> str:
    """Return how many images a disk has room for, as words; "" if packages that tell it are broken."""
    if facts["folder"]["stores"] is None:
        return ""
    from .folder import bytes_per_image

    each = bytes_per_image()
    return f", room for {counted(free // each, 'image')} at 1024 pixels, {each / 1e6:.1f} MB each"


# ---- the result as lines

_WIDTH = 13


def doctor_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the result of `doctor` as lines for people."""
    pairs = [*_machine_pairs(facts), *_package_pairs(facts), *_folder_pairs(facts)]
    lines = [f"{title:<{_WIDTH}} {shown(text)}" for title, text in pairs]
    return [*lines, *_problem_lines(facts), *_next_lines(facts)]


def _machine_pairs(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    own, python, system, cores = facts["mobilesam"], facts["python"], facts["system"], facts["processor"]
    editable = f", editable in {own['editable']}" if own["editable"] else ""
    yield "mobilesam", f"{own['version']}{editable}"
    outside = "" if python["virtual_environment"] else ", not in a virtual environment"
    yield "python", f"{python['version']}, {python['executable']}{outside}"
    yield "system", f"{system['system']}, {system['kernel']}, {system['machine']}"
    limit = "" if cores["limit"] is None else f", limited to the time of {cores['limit']:g}"
    yield (
        "processor",
        f"{cores['model']}: {cores['usable']} usable of {counted(cores['logical'], 'core')}{limit}",
    )
    if (memory := facts["memory"]) is not None:
        limit = "" if memory["limit"] is None else ", limited by this container or job"
        yield (
            "memory",
            f"{machine.size_words(memory['available'])} available of {machine.size_words(memory['total'])}{limit}",
        )
    if facts["torch"] is not None:
        yield from _torch_pairs(facts)
    disk, cache = facts["folder"]["disk"], facts["cache"]
    yield "disk", f"{machine.size_words(disk['free'])} free here{_that_fit(disk['free'], facts)}"
    if cache is not None:
        files = [f"{file['name']} ({machine.size_words(file['bytes'])})" for file in cache["files"]]
        room = f"{machine.size_words(cache['disk']['free'])} free"
        yield "checkpoints", f"{cache['folder']}: {', '.join(files) or 'none yet'}; {room}"


def _torch_pairs(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    torch, device, driver = facts["torch"], facts["device"], facts["driver"]
    build = (
        f"for CUDA {torch['cuda']}"
        if torch["cuda"]
        else f"for ROCm {torch['hip']}"
        if torch["hip"]
        else "without CUDA"
    )
    vision = facts["packages"].get("torchvision", {"version": None})["version"]
    yield (
        "torch",
        f"{torch['version']}, built {build}; torchvision {vision}; {counted(torch['threads'], 'thread')}",
    )
    yield "device", f"auto is {device['device']} in {device['precision']}: {device['why']}"
    for gpu in facts["gpus"]:
        free = f"not usable ({gpu['error']})" if gpu["error"] else f"{machine.size_words(gpu['free'])} free"
        yield (
            gpu["device"],
            f"{gpu['name']}, {machine.size_words(gpu['memory'])}, {free}, capability {gpu['capability']}",
        )
    if torch["mps"]:
        yield "mps", "there, but not used: mobilesam computes on the CPU or with CUDA"
    if driver is not None and driver["version"]:
        yield "driver", f"{driver['version']}: {', '.join(driver['gpus'])}"


def _package_pairs(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = [
        f"{name} {package['version']}" for name, package in facts["packages"].items() if package["version"]
    ]
    yield "packages", ", ".join(found) or "not known"
    complete = [name for name, extra in facts["extras"].items() if extra["complete"]]
    yield "extras", f"{', '.join(complete) or 'none'} complete"
    for name, extra in facts["extras"].items():
        if not extra["complete"]:
            yield f"  {name}", f"lacks {', '.join(extra['missing'])}: {extra['command']}"
    for name, value in facts["environment"].items():
        yield "environment", f"{name}={value}"


def _folder_pairs(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    folder = facts["folder"]
    yield "folder", folder["path"]
    if folder["stores"] is None:
        yield "", "not looked into, since packages are broken"
        return
    for found in folder["photos"]:
        count = "a tar" if found["images"] is None else counted(found["images"], "image")
        place = "in this folder" if found["path"] == "." else found["path"]
        yield "photos", f"{place}: {count}{'' if found['all'] or found['images'] is None else ' or more'}"
    for store in folder["stores"]:
        yield "store", f"{store['path']}: {_store_words(store)}"
    for run in folder["runs"]:
        yield "run", f"{run['path']}: {_run_words(run)}"


def _store_words(store: Mapping[str, Any]) -> str:
    if "error" in store:
        return str(store["error"])
    rows = store["rows"]
    damage = [f"; damaged: {problem['message']}" for problem in store["problems"][:1]]
    words = f"{rows['done']:,} done, {rows['pending']:,} pending, {rows['failed']:,} failed"
    return (
        f"{words}; {store['teacher']} at {store['image_size']} pixels, {machine.size_words(store['bytes'])}"
        f"{''.join(damage)}"
    )


def _run_words(run: Mapping[str, Any]) -> str:
    if "error" in run:
        return str(run["error"])
    state = f"epoch {run['epoch']} of {run['epochs']}"
    state = (
        "finished" if run["finished"] else f"training now, {state}" if run["trainer"] else f"stopped, {state}"
    )
    figures = (
        "" if run["skill"] is None else f"; held out: skill {run['skill']:.3f}, cosine {run['cosine']:.3f}"
    )
    return f"{run['student']} of {run['teacher']} at {run['image_size']} pixels, {state}{figures}"


def _problem_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    for problem in facts["problems"]:
        yield f"{'BROKEN' if problem['breaks'] else 'problem':<{_WIDTH}} {shown(problem['fact'])}"
        yield f"{'  mend':<{_WIDTH}} {shown(problem['mend'])}"
    if not facts["problems"]:
        yield f"{'problems':<{_WIDTH}} none"


def _next_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    step = facts["folder"]["next"]
    if step is None:
        yield "Next: mend what is broken"
        return
    yield f"Next: {shown(step['state'])}"
    if step["command"]:
        yield f"  {step['command']}"
    for need in step["needs"]:
        yield f"  needs {shown(need)}"
    for command in step["then"]:
        yield f"  or {command}" if step["command"] else f"  then {command}"
