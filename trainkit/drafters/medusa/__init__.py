"""Kind `medusa`: heads on the target's last hidden state, one for each token ahead."""

from trainkit.drafters.medusa.network import Medusa as Medusa
