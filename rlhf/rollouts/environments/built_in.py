"""Names of the built-in environments with the import path of each class.

The table holds only names, so a configuration is checked without importing an environment.
"""

from __future__ import annotations

from collections.abc import Mapping

BUILT_INS: Mapping[str, str] = {
    "guess_number": "rlhf.rollouts.environments.guess_number:GuessNumber",
    "until_answer": "rlhf.rollouts.environments.until_answer:UntilAnswer",
    "calculator": "rlhf.rollouts.environments.calculator:Calculator",
    "skyrl_gym": "rlhf.rollouts.environments.adapters.skyrl_gym:SkyRLGym",
    "textarena": "rlhf.rollouts.environments.adapters.textarena:TextArena",
    "http": "rlhf.rollouts.environments.adapters.http:HttpEnvironment",
    "openenv": "rlhf.rollouts.environments.adapters.openenv:OpenEnv",
}
