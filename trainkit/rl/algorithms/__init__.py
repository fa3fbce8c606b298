"""Policy-gradient algorithms, one file each: rewards to advantages, and the loss of the response tokens."""

from trainkit.rl.algorithms.base import Algorithm, has_signal
from trainkit.rl.algorithms.cispo import CISPO
from trainkit.rl.algorithms.dapo import DAPO
from trainkit.rl.algorithms.distillation import OnPolicyDistillation
from trainkit.rl.algorithms.dr_grpo import DrGRPO
from trainkit.rl.algorithms.grpo import GRPO
from trainkit.rl.algorithms.gspo import GSPO

__all__ = ["CISPO", "DAPO", "GRPO", "GSPO", "Algorithm", "DrGRPO", "OnPolicyDistillation", "has_signal"]
