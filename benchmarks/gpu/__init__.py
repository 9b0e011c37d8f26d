"""A card that is there for minutes: is it right, how fast is it? And without one: what would it launch?"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """What all steps share.

    Attributes:
        out: Folder of the results.
        device: 'cuda' or 'cpu'.
        tiny: The smallest networks and images, to see that the steps run; their figures mean nothing.
    """

    out: str = ''
    device: str = 'cuda'
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        return self.device == 'cuda'
