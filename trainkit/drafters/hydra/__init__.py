"""Kind `hydra`: heads on the target's last hidden state that also read the tokens drafted before theirs."""

from trainkit.drafters.hydra.network import Hydra as Hydra
