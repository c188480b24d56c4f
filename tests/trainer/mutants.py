"""`make mutants-train`: each promise is broken in a copy of the trainer, and a test has to go red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MUTANTS = (
    ("LoRA's scale is 0", "model.py", '"lora_alpha": recipe.alpha,', '"lora_alpha": 0,', "adapter"),
    ("the prompt is learnt too", "tasks/generation.py", "token if mark else IGNORED for", "token for", "generation"),
    (
        "the end is not learnt",
        "tasks/generation.py",
        "spans.append((len(before), len(upto.rstrip())))",
        "spans.append((len(before), len(before) + 1))",
        "generation",
    ),
    (
        "padding is masked by its id",
        "tasks/text.py",
        "mask = _filled([[1] * len(row) for row in ids], 0)",
        "mask = (_filled(ids, pad) != pad).long()",
        "generation",
    ),
    (
        "a class is read off the padding",
        "tasks/classification.py",
        "pad_token_id = padding(load_processor(path))",
        "pad_token_id = model.config.eos_token_id",
        "tasks",
    ),
    (
        "each micro-batch weighs the same",
        "loop.py",
        "loss = loss / weights",
        "loss = loss / (trainer.task.weight(examples[0]) * 8)",
        "loop",
    ),
    ("processes do not exchange gradients", "loop.py", "            _exchange(trainer)\n", "", "run"),
    (
        "random numbers are not those of the step",
        "batch.py",
        'random.Random(f"{seed}/{step}/{rank}").getrandbits(63)',
        "torch.seed()",
        "batch loop",
    ),
    ("a step done again draws on", "loop.py", "    while True:\n        reseed()\n", "    reseed()\n    while True:\n", "loop"),
    ("measuring leaves traces", "batch.py", "tensor.copy_(value)", "pass", "batch"),
    ("another base is loaded", "adapter.py", "if fingerprint(files) != self.fingerprint:", "if False:", "adapter"),
    ("a changed recipe is continued", "run.py", "    if changed:\n", "    if False:\n", "run"),
    (
        "the optimizer is not restored",
        "checkpoint.py",
        '        trainer.optimizer.load_state_dict(dict(state["optimizer"]))\n',
        "",
        "run",
    ),
    ("metrics are not cut back", "run.py", "        stream.truncate(kept(stream.read(), start.step))\n", "", "run"),
    ("PiSSA is not converted", "adapter.py", "    if initial is not None:\n", "    if False:\n", "adapter"),
    (
        "a typo among targets is overlooked",
        "model.py",
        "        if not found:\n",
        "        if not found and word == asked[0]:\n",
        "model",
    ),
    ("code of a repo is fetched", "hub.py", '"*.tiktoken")', '"*.tiktoken", "*.py")', "hub"),
    (
        "both weight formats are fetched",
        "hub.py",
        "return sorted([*support, single])",
        'return sorted([*support, single, *(n for n in sizes if n.endswith(".bin"))])',
        "hub",
    ),
    ("equal rows on both sides", "data.py", "groups.setdefault(row.digest, [])", "groups.setdefault(row.where, [])", "data"),
    (
        "a picture is looked for where the run was started",
        "data.py",
        "path = file.parent / image",
        "path = Path(image)",
        "data",
    ),
    ("two texts are read as one", "tasks/classification.py", " + [SEGMENTS] * any(encoding.get(SEGMENTS, ()))", "", "tasks"),
    (
        "a model that breaks on rows is judged by the others",
        "records/judge.py",
        "        _refuse_broken(side.name, rows, found)\n",
        "        pass\n",
        "judge",
    ),
    ("plain text begins without its mark", "tasks/generation.py", "(not is_rendered and ", "(False and ", "generation"),
    (
        "rows in one sequence see each other",
        "prepare.py",
        "        say(packing.refuse_leaks(trainer, material.learnt.examples))\n",
        "",
        "packing",
    ),
    (
        "a label crosses to the next row",
        "tasks/generation.py",
        'labels[number, start + 1 : end] = torch.tensor(examples[row]["labels"][1:])',
        'labels[number, start:end] = torch.tensor(examples[row]["labels"])',
        "packing",
    ),
    ("a cut exceeds its tokens", "batch.py", "(count + 1) * longest > budget", "count * longest > budget", "batch"),
    (
        "a layer that an adapter leaves alone is wrapped for it",
        "serving/pool.py",
        "fits = is_all and is_spare and",
        "fits = is_spare and",
        "pool",
    ),
    ("a merge is not compared", "merge.py", "        _refuse_different(fp32, cast, short(plan.dtype))\n", "", "merge"),
    (
        "a changed adapter is promoted all the same",
        "records/registry.py",
        "    if digest(path) != version.digest:\n",
        "    if False:\n",
        "registry",
    ),
)


def main() -> int:
    survived = []
    for what, name, old, new, tests in MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = shutil.copytree(
                ROOT / "trainer", Path(folder) / "trainer", ignore=shutil.ignore_patterns("run", "run-*", "__pycache__")
            )
            file = trainer / "neartune" / name
            text = file.read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{what}: {name} has {text.count(old)} of {old!r}")
            file.write_text(text.replace(old, new))
            chosen = [f"tests/trainer/test_{test}.py" for test in tests.split()]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen]
            environ = os.environ | {"PYTHONPATH": f"{trainer}{os.pathsep}{ROOT}"}
            done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        red = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(f"{'red ' if red else 'GREEN'} {what}: {red[0].partition('::')[2] if red else '!'}", flush=True)
        survived += [] if red else [what]
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
