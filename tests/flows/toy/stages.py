"""Toy stages, written over the real ones in the toy repository; each file below is one module.

They compute figures instead of measuring them, so that a fault has a known size: the engine's cycle time is a constant
of its code, the draft's quality follows from the spec. Acts: train_draft waits while the file TOY_HANG is there.
"""

QUANTIZE = '''
"""Toy: a checkpoint is its recipe."""
import shutil
def build(job, progress):
    shutil.copyfile(job.inputs["download"] / "tokenizer.json", job.out / "tokenizer.json")
    (job.out / "recipe.txt").write_text(job.spec["quantize"]["recipe"])
    return {}
'''

SYNTHESIZE = '''
"""Toy: answers are the tokenizer's."""
def build(job, progress):
    (job.out / "answers.txt").write_text((job.inputs["quantize"] / "tokenizer.json").read_text())
    return {}
'''

TRAIN_DRAFT = '''
"""Toy: more epochs, longer acceptance."""
import json, os, time
def build(job, progress):
    while os.path.exists(os.environ.get("TOY_HANG", "")):
        progress(1, 2, "hanging")
        time.sleep(0.05)
    training = job.spec["draft"]["training"]
    (job.out / "draft.json").write_text(json.dumps({"length": 3.0 - 1.0 / training["epochs"], **training}))
    return {}
'''

BUILD_ENGINE = '''
"""Toy: the engine's cycle time is a constant of its code."""
import json
CYCLE_US = 400.0
def build(job, progress):
    draft = json.loads((job.inputs["train_draft"] / "draft.json").read_text())
    tokenizer = (job.inputs["quantize"] / "tokenizer.json").read_text()
    (job.out / "bundle.json").write_text(json.dumps({"cycle": CYCLE_US, "draft": draft, "tokenizer": tokenizer}))
    return {}
'''

DEPLOY = '''
"""Toy: a deployment is the bundle's figures."""
import shutil
def build(job, progress):
    shutil.copyfile(job.inputs["build_engine"] / "bundle.json", job.out / "deployment.json")
    return {}
'''

VALIDATE = '''
"""Toy: figures by arithmetic, gates and verdict by the real judge."""
import json
from tasks.validate.gates import judge, passed
from tasks.validate.live import figures
def build(job, progress):
    bundle = json.loads((job.inputs["build_engine"] / "bundle.json").read_text())
    metrics = figures(bundle, 0)
    metrics["accuracy.difference"] = 0.0 if "hello" in bundle["tokenizer"] else -0.3
    gates = [{k: v for k, v in gate.items() if v is not None} for gate in job.spec["validate"]["gates"]]
    good = (job.extra.get("last_good") or {}).get("metrics")
    results = judge(metrics, gates, good)
    rows = [{"metric": r.metric, "verdict": r.state, "reason": r.reason} for r in results if r.state != "FIRST"]
    verdict = {"verdict": "PASS" if passed(results) else "FAIL", "gates": rows}
    (job.out / "verdict.json").write_text(json.dumps(verdict))
    return metrics
'''

LIVE = '''
"""Toy: what is live, with the noise of the night that the test says it is."""
import json, os
from pathlib import Path
def figures(bundle, run):
    noises = json.loads((Path(__file__).resolve().parents[2] / "noise.json").read_text())
    tonight = noises[int(os.environ.get("TOY_NIGHT", "0"))]
    noise = tonight[run % len(tonight)]
    length = bundle["draft"]["length"]
    cycle = bundle["cycle"] * noise
    return {"latency.tps_per_user.p50": 1e6 * length / cycle, "acceptance.length": length, "cycle.us": cycle}
def measure_live(spec, checkpoint, url, runs, workdir):
    return [figures(json.loads(Path(url).read_text()), run) for run in range(runs)]
'''

DEPLOYMENT = '''
"""Toy: the live pointer is a file beside the store's records."""
import json
from pathlib import Path
def pointer(store, name):
    return Path(store.local.root) / "live" / f"{name}.json"
def live_url(store, name):
    path = pointer(store, name)
    return json.loads(path.read_text())["url"] if path.exists() else None
def ensure_running(deployment_json):
    return str(deployment_json)
def discard(store, name):
    return 0
def status(store, name):
    return None
'''

PROMOTE = '''
"""Toy: promotion moves the pointer, and every move is written down."""
import json
from pathlib import Path
from specs.errors import GateFailed
def _pointer(out, name):
    return out.parents[1] / "live" / f"{name}.json"
def build(job, progress):
    verdict = json.loads((job.inputs["validate"] / "verdict.json").read_text())["verdict"]
    if verdict != "PASS":
        raise GateFailed(f"the verdict is {verdict}", job.spec["name"], "")
    told = {"url": str(job.inputs["deploy"] / "deployment.json"), "name": job.spec["name"]}
    live = _pointer(job.out, job.spec["name"])
    live.parent.mkdir(exist_ok=True)
    live.write_text(json.dumps(told))
    with open(live.with_suffix(".log"), "a") as log:
        log.write(json.dumps(json.loads(Path(told["url"]).read_text())) + chr(10))
    (job.out / "promotion.json").write_text(json.dumps(told))
    return {}
def alive(folder):
    told = json.loads((folder / "promotion.json").read_text())
    live = folder.parents[2] / "live" / f"{told['name']}.json"
    return "" if live.exists() and json.loads(live.read_text()) == told else "another version is live"
def revive(folder):
    return ""
'''

FILES = {
    "tasks/quantize/__init__.py": QUANTIZE,
    "tasks/synthesize.py": SYNTHESIZE,
    "tasks/train_draft/__init__.py": TRAIN_DRAFT,
    "tasks/build_engine.py": BUILD_ENGINE,
    "tasks/deploy.py": DEPLOY,
    "tasks/validate/__init__.py": VALIDATE,
    "tasks/validate/live.py": LIVE,
    "tasks/deployment/__init__.py": DEPLOYMENT,
    "tasks/promote.py": PROMOTE,
}
CONFIG = {  # enough for the predictor
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
}
SPEC = """\
kilotok: 1
name: toy
model: {source: "file:model"}
quantize: {calibration: {dataset: "file:prompts.jsonl", samples: 1}}
draft:
  data: {prompts: "file:prompts.jsonl", samples: 1}
  training: {epochs: 4}
deploy: {port: 8399}
validate:
  accuracy: {tasks: [code], problems: "file:prompts.jsonl"}
  gates:
    - {metric: latency.tps_per_user.p50, at_least: 0.9 of last_good}
    - {metric: acceptance.length, at_least: 2.5}
    - {metric: accuracy.difference, at_least: -0.02}
nightly: {cron: "0 2 * * *"}
"""
