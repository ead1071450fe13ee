"""mini-swe-agent works in a shell on the task. Chat Completions, by way of litellm."""

import json
import os
import sys

os.environ |= {
    "MSWEA_SILENT_STARTUP": "1",
    "MSWEA_GLOBAL_CONFIG_DIR": os.getcwd(),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}

import litellm
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

litellm.suppress_debug_info = True  # it would print to the answer
model = LitellmModel(model_name="openai/model", cost_tracking="ignore_errors")
rules = "Solve the task with the tool bash. At the end run: echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
agent = DefaultAgent(model, LocalEnvironment(), system_template=rules, instance_template="{{task}}", step_limit=4)
result = agent.run(json.load(sys.stdin)["prompt"])
print(json.dumps({"status": result["exit_status"], "answer": result["submission"]}))
