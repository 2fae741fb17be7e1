# The notebooks as a graph: what is missing or out of date is run, several at a time, and a killed run goes on.
#
#   snakemake --config study=demo              all of a study (make study STUDY=demo)
#   snakemake --config study=demo model=vit    one model of it; seed=1 another seed than the study's
#   snakemake -n --config study=demo           what would be run, and why
#   snakemake --config study=demo together=1   one job a model for all that trains: torch is imported once (make demo)
#   snakemake --config study=demo processes=2  train data-parallel, each notebook in two processes (docs/clusters.md)
#
# A notebook is done when its executed copy is there. It runs again when its code changes, a value of the study that
# it uses, a file of the study's own images or weights, or when one before it has run again; not when vitlab's own
# code changes (--forcerun train).
import functools
import hashlib
import json
import shutil
import sys
from pathlib import Path

from vitlab import files, names
from vitlab.studies import settings

config.setdefault("study", "demo")
try:
    STUDY = settings.study(config["study"])
    names.check(f"model of study {STUDY.name}:", config.get("model", next(iter(STUDY.models))), STUDY.models)
except (TypeError, ValueError) as error:  # the sentence alone
    sys.exit(f"Study {config['study']} cannot be run: {error}")
RUNS = files.root() / "runs" / STUDY.name
MODELS = [config["model"]] if "model" in config else list(STUDY.models)
SEEDS = [config["seed"]] if "seed" in config else STUDY.seeds
AFTER = {  # step: the steps whose files it reads
    "1_train": [],
    "2_sensitivity": ["1_train"],
    "3_global_pruning": ["1_train"],
    "4_heads_svd_iht": ["1_train"],
    "5_budget": ["1_train"],
    "8_foundation": ["1_train"],
    "6_efficiency": ["3_global_pruning", "4_heads_svd_iht", "5_budget"],
}
GPU = config.get("gpu", int(shutil.which("nvidia-smi") is not None))
RUN = "{sys.executable} -m vitlab run {input.notebook} --study {config[study]}"
OUT = "" if config.get("together") else " --out {output}"
RUN_MODEL = RUN + " --model {wildcards.model} --seed {wildcards.seed}" + OUT
# Steps of a job. A tiny study takes longer to import torch in each notebook than to train, so that together they
# share one kernel; else each is a job, which goes on by itself where another fails.
JOBS = [[step for step in AFTER if step != "6_efficiency"], ["6_efficiency"]]
if not config.get("together"):
    JOBS = [[step] for step in AFTER]
PROCESSES = int(config.get("processes", 1))
EACH = f"OMP_NUM_THREADS=$(( {{threads}} > {PROCESSES} ? {{threads}} / {PROCESSES} : 1 )) "
# Two small trainings on a core each are done sooner than one after the other on both: notebooks that need only the
# first one share the cores, unless they wait for one GPU.
BESIDE = {step: 1 if GPU or config.get("together") else list(AFTER.values()).count(before) for step, before in AFTER.items()}
THREADS = {step: max(PROCESSES, (workflow.cores or 1) // (len(MODELS) * len(SEEDS) * BESIDE[step])) for step in AFTER}


def code(notebook):
    """Return the hash of a notebook's code, which outputs saved by JupyterLab leave as it is."""
    cells = json.loads(Path("notebooks", f"{notebook}.ipynb").read_text())["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


@functools.cache  # once for all notebooks
def fingerprint(path):
    """Hash of the file, or of the names, sizes and times in the folder, that the study names."""
    return files.fingerprint(settings.find(config["study"], path))


def values(notebook, model=None, seed=None):
    """Return the values of the study that a notebook uses, of the models only its own.

    What lies at the paths among them is named by its fingerprint.
    """
    study = settings.study(config["study"], seed=seed)
    used = {section: settings.without_defaults(section, study[section]) for section in settings.USES[notebook]}
    paths = {study.data.name} - {*settings.DATASETS}
    if model:
        used["models"] = study.models[model]
        if settings.weights_of(config["study"], study.models[model]):
            paths |= {study.models[model].weights}
    used |= {path: fingerprint(path) for path in paths}
    return json.dumps(used, sort_keys=True)


onerror:  # of a notebook that ran, not of a study that could not begin
    print("What is done is kept, and the same command goes on from there.", file=sys.stderr)


rule all:
    input:
        RUNS / "notebooks/7_report.ipynb",


rule data:
    input:
        notebook=ancient("notebooks/0_data.ipynb"),
    output:
        RUNS / "notebooks/0_data.ipynb",
    params:  # functions of wildcards alone: Snakemake does not record others, and would miss a change
        code=lambda w: code("0_data"),
        values=lambda w: values("0_data"),
    shell:
        RUN + OUT


for steps in JOBS:
    before = {name for step in steps for name in AFTER[step]} - {*steps}

    rule:
        name:
            steps[0].partition("_")[2]
        input:
            data=RUNS / "notebooks/0_data.ipynb",
            before=[f"{RUNS}/{{model}}/seed{{seed}}/notebooks/{name}.ipynb" for name in sorted(before)],
            notebook=ancient([f"notebooks/{step}.ipynb" for step in steps]),
        output:
            [f"{RUNS}/{{model}}/seed{{seed}}/notebooks/{step}.ipynb" for step in steps],
        params:
            code=lambda w, steps=steps: "\n".join(map(code, steps)),
            values=lambda w, steps=steps: "\n".join(values(step, w.model, int(w.seed)) for step in steps),
        # Timing wants the machine for itself. threads sets OMP_NUM_THREADS and the like for each notebook.
        threads: workflow.cores or 1 if steps == ["6_efficiency"] else THREADS[steps[0]]
        resources:
            # One at a time on a GPU (profiles/default allows one); --config gpu=1 asks SLURM for it.
            gpu=GPU * (1 if steps == ["6_efficiency"] else PROCESSES),
        shell:
            RUN_MODEL if steps == ["6_efficiency"] or PROCESSES == 1 else EACH + RUN_MODEL + f" --processes {PROCESSES}"


RESULTS = expand(
    "{runs}/{model}/seed{seed}/notebooks/{step}.ipynb",
    runs=RUNS, model=MODELS, seed=SEEDS, step=["2_sensitivity", "8_foundation", "6_efficiency"],
)


rule results:  # all but the report, which would replace the published figures
    input:
        RESULTS,


rule report:
    input:
        before=RESULTS,
        notebook=ancient("notebooks/7_report.ipynb"),
    output:
        RUNS / "notebooks/7_report.ipynb",
    params:
        code=lambda w: code("7_report"),
    shell:
        RUN + OUT
