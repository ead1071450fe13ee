"""Ray and vLLM: placement, workers, rollout engines and weight transport. A second package of the same distribution.

rlhf has the mathematics and the commands, and imports neither Ray nor vLLM, so a test or a notebook can use all of it
without either. Users import only rlhf, and its commands start the workers of this package.
"""

from rlhf.cuda_builds import hide_cuda_builds

hide_cuda_builds()  # before a worker's module imports vLLM
