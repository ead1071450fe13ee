"""Post-training on Ray. The commands as typed calls; importing this package imports nothing heavy.

loaded = rlhf.load_config("recipe:ppo_smollm2", ["train.steps=3"])
sys.stdout.write(rlhf.plan(loaded))
run = rlhf.train(loaded)
run.metrics["rewards/score/mean"], run.plot(), run.diagnosis
rlhf.evaluate(loaded, model=run).sets[0].metrics["score"]
rlhf.generate(run, ["What is 7 times 8?"])[0].response
rlhf.reward(loaded, "responses.jsonl").rows[0].score
rlhf.follow_job(rlhf.submit("ppo.yaml", address="http://head:8265")).exit_code
"""

from __future__ import annotations

import rlhf.process.early_end  # noqa: F401  before all other imports

# isort: split
from rlhf.commands.convert import convert
from rlhf.commands.dashboard import dashboard
from rlhf.commands.doctor import cluster_doctor, doctor, tested_versions
from rlhf.commands.evaluate import evaluate
from rlhf.commands.export import export
from rlhf.commands.generate import generate
from rlhf.commands.merge import load_merge, merge
from rlhf.commands.models import fetch_model
from rlhf.commands.plan import plan
from rlhf.commands.play import play
from rlhf.commands.quickstart import quickstart
from rlhf.commands.recipes import recipes, show_recipe
from rlhf.commands.report import report
from rlhf.commands.reward import reward
from rlhf.commands.run import Run
from rlhf.commands.serve import serve
from rlhf.commands.serve_reward import serve_reward
from rlhf.commands.shared import load_config
from rlhf.commands.start import start
from rlhf.commands.submit import follow_job, job_status, stop_job, submit
from rlhf.commands.sweep import sweep
from rlhf.commands.tinker import load_service, tinker
from rlhf.commands.train import train
from rlhf.commands.view import view
from rlhf.cuda_builds import hide_cuda_builds
from rlhf.errors import Interrupted, Preempted, RunError, UserError
from rlhf.tracking.callbacks import Callback, StopRun
from rlhf.tracking.logs import hush_imports

hush_imports()
hide_cuda_builds()

__all__ = [
    "Callback", "Interrupted", "Preempted", "Run", "RunError", "StopRun", "UserError", "cluster_doctor", "convert",
    "dashboard", "doctor", "evaluate", "export", "fetch_model", "follow_job", "generate", "job_status", "load_config",
    "load_merge", "load_service", "merge", "plan", "play", "quickstart", "recipes", "report", "reward", "serve",
    "serve_reward", "show_recipe", "start", "stop_job", "submit", "sweep", "tested_versions", "tinker", "train", "view",
]  # fmt: skip
