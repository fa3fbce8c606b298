"""RL fine-tuning: rollouts by the runner, rewards, advantages and policy losses. Lightning is in `trainkit.modules.policy`."""
