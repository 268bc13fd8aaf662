"""What the campaigns try; `campaign.py` runs them."""

from campaigns.data import Data
from campaigns.disk import Disk
from campaigns.fuzz import Fuzz
from campaigns.kill import Kill
from campaigns.soak import Soak
from campaigns.trials import Campaign

CAMPAIGNS: dict[str, type[Campaign]] = {campaign.name: campaign for campaign in (Kill, Fuzz, Soak, Disk, Data)}
"""All of them by name."""
