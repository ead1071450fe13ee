"""The faults, at least one in each package, each with the tests of `make test` that must notice the fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """A fault: in the file at `path`, `old` becomes `new`. `old` occurs exactly once in the file."""

    name: str
    path: str
    old: str
    new: str
    tests: str  # test files under tests/, of which at least one must fail


def _mutation(name: str, path: str, old: str, new: str, tests: str) -> Mutation:
    return Mutation(name=name, path=path, old=old, new=new, tests=tests)


MUTATIONS = (
    _mutation(
        "the clipped loss takes the smaller loss of the two, not the larger one",
        "rlhf/objectives/policy_loss.py",
        "-torch.minimum(ratio * advantages, clipped_ratio * advantages)",
        "-torch.maximum(ratio * advantages, clipped_ratio * advantages)",
        "unit/test_algorithms.py parity/test_golden.py",
    ),
    _mutation(
        "the k3 estimate of the KL divergence has the wrong sign of its argument",
        "rlhf/objectives/kl.py",
        "    log_ratio = ref_logprobs - logprobs\n",
        "    log_ratio = logprobs - ref_logprobs\n",
        "unit/test_objectives_kl.py",
    ),
    _mutation(
        "GAE looks one token too far across the end of a sequence",
        "rlhf/objectives/advantages.py",
        "    next_values[counts.cumsum(0)[counts > 0] - 1] = 0.0\n",
        "",
        "unit/test_objectives_advantages.py",
    ),
    _mutation(
        "the token mean divides by the sequences",
        "rlhf/objectives/aggregation.py",
        "        weight = 1.0 / num_tokens\n",
        "        weight = 1.0 / num_sequences\n",
        "property/test_objectives_laws.py parity/test_golden.py",
    ),
    _mutation(
        "DPO prefers the rejected response",
        "rlhf/objectives/preference_loss.py",
        "    return _smoothed(beta * (chosen - rejected), label_smoothing)\n",
        "    return _smoothed(beta * (rejected - chosen), label_smoothing)\n",
        "unit/test_objectives_preference_loss.py",
    ),
    _mutation(
        "GRPO normalises although std_normalize is false",
        "rlhf/algorithms/grpo.py",
        "        if not self.config.std_normalize:\n            return advantages.",
        "        if self.config.std_normalize and False:\n            return advantages.",
        "unit/test_algorithms.py",
    ),
    _mutation(
        "a group may lag by one version more than max_staleness",
        "rlhf/controller/group_queue.py",
        "version < self.version - self.max_staleness",
        "version < self.version - self.max_staleness - 1",
        "unit/test_controller_group_queue.py",
    ),
    _mutation(
        "a wrong probe of the weights does not stop the run",
        "rlhf/controller/weight_sync.py",
        "    if not mean <= PROBE_TOLERANCE[dtype]:\n",
        "    if mean < 0.0:\n",
        "unit/test_controller_weight_sync.py",
    ),
    _mutation(
        "a role is restarted without a limit",
        "rlhf/controller/supervisor.py",
        "        count = self._allow(role, lost, work)\n",
        "        count = 1\n",
        "unit/test_controller_supervisor.py",
    ),
    _mutation(
        "a minibatch counts sequences as tokens",
        "rlhf/controller/batches.py",
        "sum(info.num_response_tokens for info in chosen)",
        "len(chosen)",
        "unit/test_controller_batches.py",
    ),
    _mutation(
        "a micro-batch may hold one token too many",
        "rlhf/data/packing.py",
        "        place = bisect.bisect_left(free, (length, -1))\n",
        "        place = bisect.bisect_left(free, (length - 1, -1))\n",
        "unit/test_data_packing.py property/test_data_laws.py",
    ),
    _mutation(
        "a resumed stream repeats its last item",
        "rlhf/data/stream.py",
        "        self.order.go_to(cursor.epoch * len(self._items) + cursor.position)\n",
        "        self.order.go_to(max(0, cursor.epoch * len(self._items) + cursor.position - 1))\n",
        "unit/test_data_stream.py",
    ),
    _mutation(
        "the learning rate rises from zero",
        "rlhf/engine/schedule.py",
        "        return step / settings.warmup_steps\n",
        "        return (step - 1) / settings.warmup_steps\n",
        "unit/test_engine_schedule.py",
    ),
    _mutation(
        "a snapshot overwrites the newest one",
        "rlhf/engine/snapshots.py",
        "        slot = 1 - self._last_slot\n",
        "        slot = self._last_slot\n",
        "unit/test_engine_snapshots.py",
    ),
    _mutation(
        "the states of a shuffled row come back in its order, not in the caller's",
        "rlhf/models/packed/forward.py",
        "    return hidden.index_select(0, tokens.argsort())\n",
        "    return hidden\n",
        "unit/test_models_packed_forward.py",
    ),
    _mutation(
        "a reward counts without its weight",
        "rlhf/rewards/combining.py",
        "sum(weight * value for weight, value in opinions)",
        "sum(value for weight, value in opinions)",
        "unit/test_rewards_scoring.py",
    ),
    _mutation(
        "a failed reward is a quiet zero",
        "rlhf/rewards/scoring.py",
        "            return self.function.score_of_killed\n        return None\n",
        "            return self.function.score_of_killed\n        return 0.0\n",
        "unit/test_rewards_scoring.py",
    ),
    _mutation(
        "the program of a model may open sockets",
        "rlhf/rewards/sandbox/confinement.py",
        '    "getpid": (39, 172),',
        '    "socket": (41, 198), "connect": (42, 203), "getpid": (39, 172),',
        "unit/test_rewards_sandbox_run.py",
    ),
    _mutation(
        "spooled groups of newer weights survive a resume",
        "rlhf/rollouts/records/spool.py",
        "if _version(path) > version]",
        "if _version(path) > version + 1]",
        "unit/test_rollouts_records_spool.py",
    ),
    _mutation(
        "an agent's tokens that a grammar chose are trained on",
        "rlhf/agents/trees.py",
        "        trained[start:end] = call.free\n",
        "        trained[start:end] = True\n",
        "unit/test_agents_trees.py",
    ),
    _mutation(
        "a call continues another one whose tokens differ",
        "rlhf/agents/trees.py",
        "        while open_lengths and open_lengths[-1] > common:\n",
        "        while open_lengths and open_lengths[-1] > common + 1:\n",
        "unit/test_agents_trees.py property/test_agents_trees_laws.py",
    ),
    _mutation(
        "the KL penalty in the reward reads the reference as the policy",
        "rlhf/workers/online/policy.py",
        "penalty = reference_kl(config, prepared.old_logprobs, prepared.ref_logprobs, mask)",
        "penalty = reference_kl(config, prepared.ref_logprobs, prepared.old_logprobs, mask)",
        "unit/test_workers_online_policy.py unit/test_algorithms_small_task.py integration/test_policy_worker.py",
    ),
    _mutation(
        "the reference ignores the temperature of the samples",
        "rlhf/workers/frozen/reference.py",
        "                temperature=self.temperature_at(temperatures, microbatch),\n",
        "",
        "unit/test_workers_frozen_reference.py",
    ),
    _mutation(
        "a mean over ranks is the mean of the last rank",
        "rlhf/tracking/metrics/reductions.py",
        "    return left.merge(right) if isinstance(left, Reduction) else left + right\n",
        "    return left.merge(right) if isinstance(left, Reduction) else right\n",
        "property/test_tracking_reductions.py",
    ),
    _mutation(
        "two processes may write to one run folder",
        "rlhf/tracking/run_folder/lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "unit/test_tracking_run_folder_folder.py",
    ),
    _mutation(
        "a damaged manifest names files outside its folder",
        "rlhf/tracking/run_folder/manifest.py",
        'if path.is_absolute() or ".." in path.parts or',
        "if path.is_absolute() or",
        "unit/test_tracking_run_folder_folder.py unit/test_tracking_run_folder_mirror.py",
    ),
    _mutation(
        "a report mixes up two runs of one name",
        "rlhf/viewing/runs.py",
        "        depth += 1\n",
        "        break\n",
        "unit/test_viewing.py unit/test_viewing_report.py",
    ),
    _mutation(
        "a report says that a response became worse by as much as it became better",
        "rlhf/viewing/report.py",
        "gain = fmean(scores[1]) - fmean(scores[0]) if",
        "gain = fmean(scores[0]) - fmean(scores[1]) if",
        "unit/test_viewing_report.py",
    ),
    _mutation(
        "a key without effect is accepted",
        "rlhf/config/validation/unused_keys.py",
        "        if _is_meant(stage, inert) and inert.key not in named and",
        "        if inert.key in named and",
        "unit/test_config_validation_unused_keys.py",
    ),
    _mutation(
        "the plan counts the weights of one rank for all ranks",
        "rlhf/planning/memory.py",
        "    return Term(name, count * itemsize / by, how, **options)\n",
        "    return Term(name, count * itemsize, how, **options)\n",
        "unit/test_planning_memory.py",
    ),
    _mutation(
        "a run starts in a folder whose mirror holds another run",
        "rlhf/preflight/run_folder.py",
        "        elif mirror.holds_run():\n",
        "        elif mirror is None:\n",
        "unit/test_actors_run_run_record.py",
    ),
    _mutation(
        "a merge ignores the scale of task vectors",
        "rlhf/merging/whole.py",
        '        tree["parameters"]["lambda"] = config.scale\n',
        '        tree["parameters"]["lambda"] = 1.0\n',
        "unit/test_merging.py parity/test_mergekit.py",
    ),
    _mutation(
        "a grid leaves out the first number of a range",
        "rlhf/sweeps/space.py",
        "bounds(parameter)[0] + place * (parameter.step or 1.0)",
        "bounds(parameter)[0] + (place + 1) * (parameter.step or 1.0)",
        "unit/test_sweeps.py",
    ),
    _mutation(
        "pass@k is the chance of a failure",
        "rlhf/evaluation/statistics.py",
        "    return 1.0 - float(Fraction(comb(n - sum(passed), k), comb(n, k)))\n",
        "    return float(Fraction(comb(n - sum(passed), k), comb(n, k)))\n",
        "unit/test_evaluation.py",
    ),
    _mutation(
        "a server without a token answers pages of other sites",
        "rlhf/serving.py",
        "    if origin is not None and not _names_this_machine(origin):\n",
        "    if origin is None and not _names_this_machine(origin):\n",
        "unit/test_serving.py",
    ),
    _mutation(
        "an engine accepts weights with another checksum",
        "actors/rollout/engine_weights.py",
        "if checksum != manifest.checksum]",
        "if not checksum]",
        "integration/test_weight_sync.py",
    ),
    _mutation(
        "an engine that was never synced generates",
        "actors/rollout/engine_weights.py",
        "        if self.version is None:\n            raise RunError(",
        "        if self.version == -1:\n            raise RunError(",
        "unit/test_actors_rollout_engine_group.py",
    ),
    _mutation(
        "two swapped words of the weights have one checksum",
        "actors/weights/checksum.py",
        "(chunk * (at.mul_(WEIGHT_STEP).bitwise_or_(1))).sum()",
        "chunk.sum()",
        "unit/test_actors_weights.py",
    ),
    _mutation(
        "an engine with full caches gets another group",
        "actors/rollout/dispatch.py",
        "self.tokens + tokens <= capacity.cache_tokens and",
        "tokens <= capacity.cache_tokens and",
        "unit/test_actors_rollout_dispatch.py",
    ),
    _mutation(
        "the front accepts fields that it does not support",
        "actors/serving/refusals.py",
        "        if name in _NO_EFFECT or not value:\n",
        "        if name not in _NOT_HERE:\n",
        "unit/test_actors_serving_gateway.py",
    ),
    _mutation(
        "the metrics of ranks that share micro-batches count twice",
        "actors/roles/gang.py",
        "        return results[:: self.sequence_parallel]\n",
        "        return results\n",
        "unit/test_actors_roles_gang.py",
    ),
    _mutation(
        "the death of a rank is blamed on its peer",
        "actors/cluster/waiting.py",
        "key=lambda failure: (not isinstance(failure[1], DEATHS), failure[0])",
        "key=lambda failure: failure[0]",
        "unit/test_actors_cluster_waiting.py",
    ),
    _mutation(
        "secrets travel with a submitted job",
        "actors/jobs/package.py",
        '    r"\\.env|',
        '    r"\\.environment|',
        "unit/test_actors_jobs_package.py",
    ),
    _mutation(
        "doctor overlooks a prompt that was trained twice",
        "actors/doctor/run_folder.py",
        "        if prompt in prompts:\n",
        "        if prompt in ids:\n",
        "unit/test_actors_doctor_run_folder.py",
    ),
    _mutation(
        "the limit of a container is its group's own, without the groups above",
        "rlhf/process/cgroups.py",
        "total=min(limit.total for limit in limits)",
        "total=max(limit.total for limit in limits)",
        "unit/test_process_cgroups.py",
    ),
    _mutation(
        "a sample is scored with the columns of the row before",
        "rlhf/scoring/score_file.py",
        "for name, value in data[number].columns.items()",
        "for name, value in data[number - 1].columns.items()",
        "unit/test_cli_reward.py",
    ),
    _mutation(
        "a driver that dies twice at the same step is started again",
        "rlhf/commands/supervision.py",
        "        elif self._last == last and (",
        "        elif self._last is None and (",
        "unit/test_commands_supervision.py",
    ),
    _mutation(
        "engines measure the free memory of a GPU while ranks start there",
        "actors/run/engine_pool.py",
        "            await self.engines.start(deadline_s=limit_s)\n",
        "            groups.append(self.engines)\n",
        "unit/test_actors_run_run_record.py",
    ),
    _mutation(
        "a sweep stops the better trials early",
        "actors/sweeps/search.py",
        'mode="min" if sweep.lower_is_better else "max",\n            max_t',
        'mode="max" if sweep.lower_is_better else "min",\n            max_t',
        "unit/test_sweeps.py",
    ),
    _mutation(
        "greedy requests divide the logits of their drafts by zero",
        "actors/vllm_patches/drafts_cpu.py",
        "torch.where(values == replace_from, torch.full_like(values, replace_to), values)",
        "values",
        "unit/test_actors_vllm_patches_repairs.py",
    ),
)
