"""Fix the defects of vLLM 0.32.0, the version that the project requires.

A row names a module, what vLLM does without the module, and tests of tests/unit/test_actors_vllm_patches.py. The tests
fail once vLLM no longer has the defect. `an engine`: no cheap test can tell, so remove the module and test engines.

module         without the module, vLLM                                          tests
delta_cpu      computes the gated delta rule on a CPU only in bfloat16           delta_rule
drafts_cpu     accepts drafts on a CPU by temperatures from unset memory         drafts
generators     draws the numbers of a continued response again on a CPU          first_runner
experts_cpu    does not return the experts of a CPU engine                       first_runner
lora_cpu       copies matrices for each token on a CPU, and adapts base tokens   adapter, base_tokens
models         lacks embeddings of Gemma 3n and towers' names, wants unused norms     gemma_3n, a_x_k1, towers
router_biases  drops the biases among the experts of a file                      bias_in_files
routers_cpu    drops or refuses biases without groups of experts on a CPU        bias_without_groups
unread         passes over weights of a file without an error                    unread_weight
reload         counts constants in a reload, and continues a failed one          reload
cut_calls      answers with raw text for a call that a limit cuts off            cut_call
inspection     imports packages for CUDA on a CPU, in a process without rlhf     inspection
grammar_time   lets a grammar take any time for a token                          an engine
settings       has other windows, scales and rotations than transformers         an engine
"""
