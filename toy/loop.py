"""GRPO for GoT-R1, all of it: no engine, no processes, no log.    python -m toy.loop"""

import torch

import gotr1
import rewards
from toy.world import ToyJudge, crispness, toy_prompts
from train_grpo import group_advantages, grpo_loss

policy, tokenizer = gotr1.load_policy("toy")
reference, _ = gotr1.load_policy("toy")  # frozen: the policy must not drift far from it
optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4, weight_decay=0.0)
judge = ToyJudge()
group = 8  # samples per prompt

for step in range(30):
    prompts = toy_prompts(8, seed=step)
    samples = gotr1.rollout(policy, tokenizer, prompts, group, seed=step, max_chain=96)
    images = gotr1.decode_images(policy, samples.image_tokens)

    repeated = [prompt for prompt in prompts for _ in range(group)]
    scores = rewards.score(judge, crispness, repeated, samples.chains, images)
    totals = torch.tensor([row["total"] for row in scores])
    advantages = group_advantages(totals, group, std=False)  # reward minus the mean of the group

    logp, mask = gotr1.token_logps(policy, samples)  # (64, tokens), with gradient
    with torch.no_grad():
        logp_ref, _ = gotr1.token_logps(reference, samples)
    weight = mask / mask.sum()  # one mean over all sampled tokens
    loss, _ = grpo_loss(logp, logp.detach(), logp_ref, advantages, weight, kl=0.02)

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    print(f"step {step + 1:2d}: reward {totals.mean():.2f}")
